"""Makes the counters of Lightning's fit loop agree with the samples that a resumed run has consumed.

``sampler.py`` resumes the data itself. The counters set here decide when an epoch ends, when gradients are applied,
when validation is due and which step the loggers get.
"""

import warnings

from lightning.pytorch import Trainer

from tedlab._compat.lightning import BATCHES_THAT_STEPPED


def align_fit_loop(trainer: Trainer, epoch: int, epoch_batches: int, total_batches: int) -> None:
    """Makes a fit loop that was restored from a checkpoint continue after ``epoch_batches`` batches of ``epoch``.

    Lightning's restored counters cannot be used as they are, for two reasons. They count micro-batches of one rank,
    so they mean something else once the number of data ranks or the micro-batch size has changed. And when a run stops
    at ``max_steps``, Lightning closes its epoch, so a checkpoint saved afterwards (from ``on_train_end``, say) claims
    one epoch too many. This sets the state that a checkpoint saved in ``on_train_batch_end`` would have, whichever
    hook saved it.

    Args:
        trainer: A trainer whose ``fit_loop`` has been restored and has not yet run.
        epoch: Index of the epoch that holds the next batch, from 0.
        epoch_batches: How many batches of that epoch this rank has trained on; fewer than the epoch has.
        total_batches: How many batches this rank has trained on over all epochs.
    """
    # Lightning looks for a loader with a state_dict, but here the data module keeps that state.
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    fit_loop = trainer.fit_loop
    for epochs in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
        begun = epoch + 1 if epoch_batches else epoch
        epochs.load_state_dict({"ready": begun, "started": begun, "processed": epoch, "completed": epoch})
    fit_loop.restarting = True  # its setter decides from the counters whether there is a batch loop to continue

    batch_loop = fit_loop.epoch_loop
    unfinished = 1 if fit_loop.restarting else 0  # a continued batch loop first completes the batch it was saved in
    progress = batch_loop.batch_progress
    for batches, count in ((progress.total, total_batches), (progress.current, epoch_batches)):
        state = {"ready": count, "started": count, "processed": count, "completed": count - unfinished}
        batches.load_state_dict(state)
    progress.is_last_batch = False
    batch_loop.on_load_checkpoint({BATCHES_THAT_STEPPED: trainer.global_step - unfinished})
