"""Analyses for tests, in one call."""

from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.options import Run, RunOptions, Texts
from hf_lowrank.modeling.targets import find_targets


def quiet_run(calibration=None, held_out=None, evaluation=None, **options) -> Run:
    """A run without progress bars."""
    return Run(Texts(calibration, held_out, evaluation), RunOptions(progress=False, **options))


def analyzed(model, config, batches=None, *, with_gradients=False, **options) -> Analysis:
    """Spectra of a model's targets."""
    run = quiet_run(batches, **options)
    targets = find_targets(model, config)
    return analyze(model, targets, config, run, with_gradients=with_gradients)
