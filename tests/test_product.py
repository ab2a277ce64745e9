"""The whole product: every memory and retention with every bias and algorithm, thousands of rules.

`pytest -m slow --shard 1/4` runs a quarter of it; `benchmarks/product.py` does the same and writes a table.
"""

import pytest
from cases import FEW, MEMORIES, RETENTIONS, product
from contract import check


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_rule_keeps_the_contract(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("gate", RETENTIONS, ids=str)
@pytest.mark.parametrize("mem", MEMORIES, ids=str)
def test_every_rule_is_refused_with_a_reason_or_keeps_the_contract(mem, gate):
    found = product(mem, gate)
    for refusal in found.refusals:
        # It names what was chosen and says what to write.
        assert any(str(part) in refusal.reason for part in refusal.choices.values()), refusal.reason
        assert "Write " in refusal.reason, refusal.reason
    broken = {}
    for case in found.cases:
        try:
            check(case)
        except Exception as error:
            broken[str(case)] = f"{type(error).__name__}: {error}"
    assert not broken, "\n\n".join(f"{case}\n{said}" for case, said in broken.items())
