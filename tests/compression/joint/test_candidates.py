"""Which candidates are tried, from which plans."""

import pytest

from hf_lowrank import LowRankConfig
from hf_lowrank.compression.joint.candidates import Candidates, JointSettings
from hf_lowrank.ranks.tolerance import LossDifference
from tests.compression.analyzed import analyzed
from tests.tiny_models import tiny_llama

STEP = 8e-3


class Scripted(Candidates):
    """Each limit of the correction leads to a plan of its own."""

    def _trusted_plan(self, param_ratio, trust):
        return self.analysis.plan_for_ratio(param_ratio - trust / 10)


class HeldOut:
    """Rises by the kept share, as written down; corrections in between lower them a little."""

    def __init__(self, rises):
        self.rises = rises
        self.seen = []

    def difference(self, factors, plan, stop_above):
        self.seen.append((round(plan.param_ratio, 2), factors))
        return LossDifference(self.rises[round(plan.param_ratio, 2)], 0.01, 8, True)


@pytest.mark.parametrize("best", [0.6, 0.55, 0.5])
def test_corrections_start_from_the_best_plan_so_far(text, best):
    model = tiny_llama()
    analysis = analyzed(model, LowRankConfig(param_ratio=0.6), text[:4], with_gradients=True)
    rises = {0.6: 0.5, 0.55: 0.4, 0.5: 0.45} | {best: 0.1}
    held_out = HeldOut(rises)
    settings = JointSettings(trusts=(0.5, 1.0), largest_steps=(STEP,))
    candidates = Scripted(model, analysis, held_out, settings)
    baseline, accepted = candidates.best_at(0.6)
    assert [ratio for ratio, _ in held_out.seen] == [0.6, 0.55, 0.5, best]
    corrected = held_out.seen[-1][1]
    changed = {n for n, factors in corrected.items() if factors is not analysis.factors[n]}
    assert changed
    plan = candidates.analysis.plan_for_ratio(best)
    for name in changed:
        assert len(corrected[name].right) == plan.ranks[name]
    assert round(accepted.plan.param_ratio, 2) == best
    assert round(baseline.plan.param_ratio, 2) == 0.6
