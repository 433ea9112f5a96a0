"""Fine-tuning: from a model and examples to a model that replies, or that labels.

The verbs can be named, and their help shown, without torch: that comes when they are called.
"""

from typing import Any

from gptopt.config_finetune import ClassifyOptions, SftOptions


def sft(options: SftOptions) -> dict[str, Any]:
    """Teach a model to reply, and leave a run folder behind.

    Returns:
        What `gptopt.training.train` returns, losses being those of the replies' tokens, and
        examples, val_examples, dropped (too long, by --overlong), blocks (packed, of an epoch)
        and epochs.

    Raises:
        UserError, Diverged, Interrupted: as `gptopt.training.train`.
    """
    from gptopt.finetune.replies import Replies
    from gptopt.training.run import run

    return run(Replies(options))


def classify(options: ClassifyOptions) -> dict[str, Any]:
    """Teach a model to label text, and leave a run folder behind.

    Returns:
        What `gptopt.training.train` returns, losses being per text, and examples, val_examples,
        dropped, epochs, labels, val_accuracy, val_f1 (the mean over labels), val_scores (of each
        label: precision, recall, f1, count), confusion (rows: true labels; null with
        --multi-label) and confusion_matrix (PNG, null without matplotlib or held-out examples).

    Raises:
        UserError, Diverged, Interrupted: as `gptopt.training.train`.
    """
    from gptopt.finetune.labelling import Labels
    from gptopt.training.run import run

    return run(Labels(options))
