"""Training: text in, a run folder with checkpoints that can be resumed bit for bit.

The verb can be named, and its help shown, without torch: that comes when it is called.
"""

from typing import Any

from gptopt.config import TrainOptions


def train(options: TrainOptions) -> dict[str, Any]:
    """Train a GPT on text or on a data folder and leave a run folder behind.

    Returns:
        The JSON object, also kept as RUN/result.json:
        out (run folder), steps (optimiser steps taken), stopped_by ("steps" | "time"),
        train_loss (mean over the last line of metrics.jsonl, nats per token), val_loss,
        best_val_loss (null where nothing was evaluated), best_step, bits_per_byte (of
        best_val_loss; null for what is no next-token run on text), tokens (consumed),
        seconds (of training, evaluation and saving), tokens_per_second (of training alone),
        mfu (share of the measured matmul peak, null where unknown), skipped (steps whose gradients
        were not finite), parameters, device, dtype, checkpoint (the last one's folder),
        best_checkpoint (null where nothing was evaluated), loss_curve (PNG, null without
        matplotlib), resumed_from (step, null for a fresh run) and already_complete.
        With dry_run nothing is written, and what it returns is gptopt.training.estimate.dry_run's.

    Raises:
        UserError: the options, the text or the run folder do not allow it (exit 2).
        Diverged: more steps than max_skips had gradients that are not finite (exit 3).
        Interrupted: SIGINT or SIGTERM, after saving (exit 130 / 143).
    """
    from gptopt.training.run import run

    if options.distill.teacher is not None:
        from gptopt.training.distillation import Distilled

        return run(Distilled(options))
    from gptopt.training.pretraining import Masked, NextToken

    return run((Masked if options.objective == "masked" else NextToken)(options))
