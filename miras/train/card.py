"""The model card: what a trained model is, what it was trained on and how to use it, beside its weights."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from miras.train.summary import Summary


def card(summary: Summary, context: int) -> str:
    """The README.md of a trained model, as the Hugging Face hub reads it.

    Args:
        summary: of the run.
        context: training length in tokens.
    """
    head = ModelCardData(library_name="miras", pipeline_tag="text-generation", tags=["miras", "arxiv:2504.13173"])
    data = summary.data
    rows = {
        "rule": summary.mixer,
        "parameters": f"{summary.parameters:,}",
        "validation": f"{summary.val_bits_per_byte:.3f} bits per byte",
        "training": f"{summary.steps:,} steps, {summary.tokens:,} tokens, context {context:,}, seed {summary.seed}",
        "data": f"{data['name']}, {data['train_tokens']:,} tokens for training, hash {data['hash']}",
        "tokenizer": data["tokenizer"],
        "versions": ", ".join(f"{package} {version}" for package, version in summary.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{head.to_yaml()}
---

# {summary.name}

A language model whose layers are memories that learn while they read, trained with `miras`
([arXiv 2504.13173](https://arxiv.org/abs/2504.13173)).

| | |
|---|---|
{table}

```python
import miras.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "..."  # the folder of this file
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
print(tokenizer.decode(model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=100)[0]))
```

Trained by

    {summary.command}

It has read {summary.tokens:,} tokens: it knows the looks of its data, not what is true.
"""
