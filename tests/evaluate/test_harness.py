"""lm-evaluation-harness over local files of the schema its own tasks have, with no network."""

import json

import pytest
import yaml
from small_run import WORDS, small, write_text

from miras.errors import UsageError
from miras.train import train

harness = pytest.importorskip("miras.evaluate.harness")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = small(write_text(folder), folder, steps=3)
    train(config)
    return config.out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """wikitext's and piqa's schema, three documents each."""
    folder = tmp_path_factory.mktemp("tasks")
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    pages = [{"page": " ".join(WORDS * n)} for n in (1, 2, 3)]
    goals = [{"goal": "the memory", "sol1": "learns", "sol2": "zebra", "label": n % 2} for n in range(3)]
    perplexity = {
        "task": "local_wikitext",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "page",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
    }
    choice = {
        "task": "local_piqa",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    for task, documents in ((perplexity, pages), (choice, goals)):
        data = folder / f"{task['task']}.jsonl"
        data.write_text("\n".join(map(json.dumps, documents)))
        file = folder / f"{task['task']}.yaml"
        file.write_text(yaml.safe_dump({**common, **task, "dataset_kwargs": {"data_files": {"test": str(data)}}}))
    return str(folder)


def test_local_tasks_of_both_kinds(trained, tasks):
    results = harness.harness(["local_wikitext", "local_piqa"], [trained], tasks)
    found = results[trained]["results"]
    assert 0 < found["local_wikitext"]["bits_per_byte,none"] < 9
    assert 0 <= found["local_piqa"]["acc,none"] <= 1
    said = harness.table(results[trained])
    assert "local_wikitext" in said and "acc_norm" in said


def test_the_model_type_is_registered(trained):
    from lm_eval.api.registry import get_model

    model = get_model("miras").create_from_arg_obj({"pretrained": trained}, {"batch_size": 2, "device": None})
    assert isinstance(model, harness.MirasLM) and model.batch_size == 2


def test_rolling_likelihood_is_our_own(trained, tasks):
    """One document as the harness sees it: predicted from the end-of-text token on."""
    import torch

    model = harness.MirasLM(trained)
    text = " ".join(WORDS)
    ids = torch.tensor([[model.eot_token_id, *model.tok_encode(text)]])
    with torch.no_grad():
        logits = model.model(ids).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, ids[0, 1:, None]).sum().item() / len(text) / -torch.log(torch.tensor(2.0)).item()
    found = harness.harness(["local_wikitext"], [trained], tasks, limit=1)[trained]["results"]
    assert found["local_wikitext"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_had_is_said(trained, tasks, tmp_path):
    with pytest.raises(UsageError, match=r"expected a folder with \.yaml files of tasks"):
        harness.harness(["x"], [trained], str(tmp_path / "none"))
    hub = yaml.safe_dump(
        {"task": "far", "dataset_path": "org/far", "test_split": "test", "output_type": "loglikelihood"}
    )
    (tmp_path / "far.yaml").write_text(hub)
    with pytest.raises(UsageError, match=r"--lm-eval far: the Hugging Face hub did not give its data.* HF_ENDPOINT"):
        harness.harness(["far"], [trained], str(tmp_path))


@pytest.mark.slow  # the harness reads its 14,000 tasks
def test_the_papers_tasks_have_these_names(trained, tmp_path):
    known = harness.TaskManager().all_tasks
    assert set(harness.PAPER) <= set(known)
    with pytest.raises(UsageError, match="Did you mean 'hellaswag'"):
        harness.harness(["hellaswg"], [trained])
