"""The contract: each argument, hook and callback of the pinned Lightning, and what becomes of it under TEDStrategy.

``python -m tests.lightning.contract`` writes it to docs/lightning.md; ``test_contract.py`` holds the two, and the
installed Lightning, to each other.
"""

from dataclasses import dataclass
from pathlib import Path

import lightning

PAGE = Path(__file__).parents[2] / "docs" / "lightning.md"
SAME = "As under DDP."

ARGUMENT = "tests/lightning/test_arguments.py::test_an_argument_does_what_it_does_under_ddp"
CALLBACK = "tests/lightning/test_callbacks.py::test_a_callback_does_what_it_does_under_ddp"
HOOK = "tests/lightning/test_hooks.py::test_it_is_as_under_ddp"
REFUSED = "tests/lightning/test_refused.py::test_it_is_refused_by_every_process_before_the_first_step"
RESTORE = "tests/lightning/test_restore.py::"
STRATEGY = "tests/strategy/test_strategy.py::"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: as in Lightning.
        works: or is refused.
        note: what differs from DDP.
        test: ``file::function`` or ``file::function[case]``.
    """

    name: str
    works: bool
    note: str
    test: str


def works(name: str, test: str, note: str = SAME) -> Row:
    return Row(name, True, note, test)


def refused(name: str, test: str, note: str) -> Row:
    return Row(name, False, note, test)


def argument(name: str, note: str = SAME, cell: str | None = None) -> Row:
    return works(name, f"{ARGUMENT}[{cell or name}]", note)


def callback(name: str, note: str = SAME) -> Row:
    return works(name, f"{CALLBACK}[{name}]", note)


def hook(name: str, note: str = SAME, cell: str = "calls") -> Row:
    return works(name, f"{HOOK}[{cell}]", note)


TRAINER = [
    works("accelerator", f"{STRATEGY}test_a_module_of_the_user_s_own_trains_as_in_one_process", "CPU and GPUs."),
    works(
        "strategy",
        f"{STRATEGY}test_the_strategy_is_known_by_name_and_single_precision_trains",
        '`TEDStrategy(…)`, or `"ted"` for its defaults.',
    ),
    works(
        "devices",
        f"{STRATEGY}test_degrees_that_do_not_fit_the_devices_are_refused_at_the_start",
        "devices × nodes must be a multiple of tensor × expert; anything else is refused.",
    ),
    works(
        "num_nodes",
        f"{STRATEGY}test_degrees_that_do_not_fit_the_devices_are_refused_at_the_start",
        "devices × nodes must be a multiple of tensor × expert; anything else is refused.",
    ),
    works(
        "precision",
        f"{REFUSED}[precision]",
        "`32-true`, `64-true`, `bf16-true`, `16-true`, `bf16-mixed`, `16-mixed`; others are refused. In half precision "
        "the optimizer has fp32 master copies. With fp16 the loss is scaled, also in `16-true`, and a step that "
        "overflows anywhere is skipped everywhere.",
    ),
    argument("logger", "Process 0 writes.", "log_every_n_steps"),
    works("callbacks", f"{HOOK}[calls]", "See below."),
    argument("fast_dev_run"),
    argument("max_epochs", cell="enable_checkpointing"),
    argument("min_epochs"),
    argument("max_steps"),
    argument("min_steps"),
    argument("max_time", cell="min_epochs"),
    argument("limit_train_batches", "As under DDP: counts batches of each data rank."),
    argument("limit_val_batches", cell="limit_evaluation"),
    argument("limit_test_batches", cell="limit_evaluation"),
    argument("limit_predict_batches", cell="limit_evaluation"),
    argument("overfit_batches"),
    argument("val_check_interval"),
    argument("check_val_every_n_epoch"),
    argument("num_sanity_val_steps"),
    argument("log_every_n_steps"),
    argument("enable_checkpointing", "A checkpoint is a directory that loads under any other layout."),
    argument("enable_progress_bar"),
    argument("enable_model_summary", "Counts whole parameters, not this process's parts."),
    argument("accumulate_grad_batches", "As under DDP: gradients are reduced once, after the last micro-batch."),
    argument("gradient_clip_val", "The norm is the whole model's, over all processes."),
    works(
        "gradient_clip_algorithm",
        "tests/lightning/test_gradients.py::test_the_trainer_clips_by_value[trainer's value]",
        "`norm` and `value`.",
    ),
    argument("deterministic"),
    argument("benchmark", cell="deterministic"),
    argument("inference_mode"),
    argument("use_distributed_sampler", "Samples are divided over data ranks; tensor ranks read the same ones."),
    argument("profiler"),
    argument("detect_anomaly", "Slow: it gathers the gradients of sharded parameters to check them."),
    argument("barebones"),
    argument("plugins", "Precision plugins and cluster environments; the others are below."),
    refused("sync_batchnorm", f"{REFUSED}[sync_batchnorm]", "Refused if there is batch norm to synchronise."),
    argument("reload_dataloaders_every_n_epochs"),
    argument("default_root_dir"),
    argument("enable_autolog_hparams"),
    argument("model_registry"),
]

_CALLED = "Called in the same order and as often as under DDP."
_FORMS = "All forms: one optimizer, lists, dictionaries, with schedulers, None. Optimizers must be element-wise."


def called(*names: str) -> list[Row]:
    return [hook(name, _CALLED) for name in names]


_LOOP_HOOKS = [
    f"on_{stage}_{event}"
    for stage in ("train", "validation", "test", "predict")
    for event in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
]
_GRADIENTS = "tests/lightning/test_gradients.py::test_what_a_hook_sees_and_does_is_what_torch_would"
_SEEN = (
    "`.grad` is reduced, sharded like its parameter, with the norms and sums of the whole; changes to it take effect."
)

MODULE = [
    hook("all_gather", "Gathers over data ranks, so that each sample comes once.", "all_gather"),
    works("automatic_optimization", f"{STRATEGY}test_manual_optimization_gives_the_weights_of_automatic"),
    hook("backward", cell="overridden steps"),
    works(
        "clip_gradients",
        f"{STRATEGY}test_manual_optimization_gives_the_weights_of_automatic",
        "Clips by the norm of the whole model.",
    ),
    hook("configure_callbacks", cell="overridden steps"),
    hook("configure_gradient_clipping", cell="overridden steps"),
    hook("configure_model", "The place to build layers, with `self.trainer.strategy.topology`.", "calls"),
    hook("configure_optimizers", _FORMS, "overridden steps"),
    refused("configure_sharded_model", f"{REFUSED}[configure_sharded_model]", "Removed from Lightning."),
    works("current_epoch", f"{ARGUMENT}[max_steps]"),
    hook("device_mesh", "None, as under DDP: the meshes are `self.trainer.strategy.topology`'s.", "properties"),
    hook("example_input_array", cell="properties"),
    hook("fabric", cell="properties"),
    hook("forward", cell="properties"),
    hook("freeze", cell="frozen"),
    hook("global_rank", "The rank among all processes; `topology.comm.rank('data')` is the data rank.", "properties"),
    works("global_step", f"{ARGUMENT}[max_steps]"),
    refused(
        "load_from_checkpoint",
        f"{RESTORE}test_load_from_checkpoint_says_what_to_do_with_a_directory",
        "Sharded layers need a Trainer's topology: give the directory to `trainer.fit`, `validate`, … as `ckpt_path`, "
        "call `tedlab.checkpoint.load_weights` in `on_fit_start`, or consolidate it.",
    ),
    hook("local_rank", cell="properties"),
    hook(
        "log",
        "All reductions, `on_step`, `on_epoch`, `batch_size`, `sync_dist`. Means and sums count each sample once.",
        "self.log",
    ),
    hook("log_dict", cell="self.log"),
    works("logger", f"{ARGUMENT}[log_every_n_steps]"),
    works("loggers", f"{ARGUMENT}[log_every_n_steps]"),
    hook("lr_scheduler_step", cell="overridden steps"),
    works(
        "lr_schedulers",
        "tests/lightning/test_gradients.py::test_several_optimizers_each_clip_their_own_and_zero_grad_forgets",
    ),
    works(
        "manual_backward",
        "tests/lightning/test_gradients.py::test_several_optimizers_each_clip_their_own_and_zero_grad_forgets",
    ),
    works("on_after_backward", _GRADIENTS, _SEEN),
    hook("on_after_batch_transfer", cell="overridden steps"),
    *called("on_before_backward"),
    hook("on_before_batch_transfer", cell="overridden steps"),
    works("on_before_optimizer_step", _GRADIENTS, _SEEN),
    *called("on_before_zero_grad", "on_fit_end", "on_fit_start"),
    hook("on_gpu", cell="properties"),
    works(
        "on_load_checkpoint",
        f"{RESTORE}test_what_on_load_checkpoint_changes_arrives_in_the_model",
        "`checkpoint['state_dict']` holds the loaded tensors, sharded; there are no `optimizer_states`.",
    ),
    *called(*[n for n in _LOOP_HOOKS if n.startswith("on_predict")], "on_predict_model_eval"),
    hook("on_save_checkpoint", cell="state"),
    *called(*[n for n in _LOOP_HOOKS if n.startswith("on_test")], "on_test_model_eval", "on_test_model_train"),
    *called(*[n for n in _LOOP_HOOKS if n.startswith("on_train")]),
    *called(*[n for n in _LOOP_HOOKS if n.startswith("on_validation")]),
    *called("on_validation_model_eval", "on_validation_model_train", "on_validation_model_zero_grad"),
    hook("optimizer_step", cell="overridden steps"),
    hook("optimizer_zero_grad", cell="overridden steps"),
    works(
        "optimizers",
        "tests/lightning/test_gradients.py::test_several_optimizers_each_clip_their_own_and_zero_grad_forgets",
    ),
    *called("predict_dataloader"),
    hook("predict_step", cell="properties"),
    *called("prepare_data"),
    hook("print", "Process 0 prints.", "all_gather"),
    *called("setup"),
    works(
        "strict_loading",
        f"{RESTORE}test_a_parameter_that_a_checkpoint_lacks_is_named_unless_loading_is_not_strict",
        "False loads the parameters that both have; one of a different shape is an error.",
    ),
    *called("teardown", "test_dataloader"),
    works("test_step", f"{ARGUMENT}[limit_evaluation]"),
    refused("to_onnx", f"{REFUSED}[to_onnx]", "Not supported; tested only without the package that it needs."),
    refused("to_tensorrt", f"{REFUSED}[to_tensorrt]", "Not supported; tested only without the package that it needs."),
    refused(
        "to_torchscript",
        f"{REFUSED}[to_torchscript]",
        "torch refuses it with its own error: it cannot script layers that communicate.",
    ),
    works(
        "toggle_optimizer",
        "tests/lightning/test_gradients.py::test_several_optimizers_each_clip_their_own_and_zero_grad_forgets",
    ),
    works(
        "toggled_optimizer",
        "tests/lightning/test_gradients.py::test_several_optimizers_each_clip_their_own_and_zero_grad_forgets",
    ),
    *called("train_dataloader"),
    hook("trainer", cell="properties"),
    hook("training_step", "A step that returns None is refused by Lightning, as under DDP.", "a step without a loss"),
    hook("transfer_batch_to_device", cell="overridden steps"),
    hook("unfreeze", cell="frozen"),
    works(
        "untoggle_optimizer",
        "tests/lightning/test_gradients.py::test_several_optimizers_each_clip_their_own_and_zero_grad_forgets",
    ),
    *called("val_dataloader"),
    works("validation_step", f"{ARGUMENT}[val_check_interval]"),
]

DATA = [
    hook("from_datasets", cell="data from data sets"),
    refused(
        "load_from_checkpoint",
        f"{RESTORE}test_load_from_checkpoint_says_what_to_do_with_a_directory",
        "Give the directory to the Trainer as `ckpt_path`.",
    ),
    hook("load_state_dict", cell="state"),
    hook("name", cell="data from data sets"),
    *called("on_after_batch_transfer", "on_before_batch_transfer"),
    hook("on_exception", "Called in the process that raises; the launcher ends the others.", "on_exception"),
    *called("predict_dataloader", "prepare_data", "setup"),
    hook("state_dict", cell="state"),
    *called("teardown", "test_dataloader", "train_dataloader", "transfer_batch_to_device", "val_dataloader"),
]

CALLBACK_HOOKS = [
    hook("load_state_dict", cell="state"),
    works("on_after_backward", _GRADIENTS, _SEEN),
    *called("on_before_backward", "on_before_zero_grad"),
    works("on_before_optimizer_step", _GRADIENTS, _SEEN),
    hook("on_exception", "Called in the process that raises; the launcher ends the others.", "on_exception"),
    *called("on_fit_end", "on_fit_start"),
    hook("on_load_checkpoint", cell="state"),
    *called(*_LOOP_HOOKS, "on_sanity_check_start", "on_sanity_check_end"),
    hook("on_save_checkpoint", "May add sharded tensors in dictionaries, which load under any layout.", "state"),
    *called("setup", "teardown"),
    hook("state_dict", "May hold sharded tensors in dictionaries, which load under any layout.", "state"),
    hook("state_key", cell="state"),
]

_FINETUNING = "tests/lightning/test_trained_parameters.py::test_base_finetuning_thaws_and_adds_a_group"
CALLBACKS = [
    works("BackboneFinetuning", _FINETUNING),
    works("BaseFinetuning", _FINETUNING),
    callback("BasePredictionWriter", "As under DDP. Tensor ranks write the same; let only one write (see `topology`)."),
    refused("BatchSizeFinder", f"{REFUSED}[BatchSizeFinder]", "Lightning refuses it under every distributed strategy."),
    works("Callback", f"{HOOK}[calls]"),
    works("Checkpoint", f"{CALLBACK}[ModelCheckpoint]"),
    callback("DeviceStatsMonitor"),
    callback("EarlyStopping"),
    works("GradientAccumulationScheduler", f"{ARGUMENT}[GradientAccumulationScheduler]"),
    callback("LambdaCallback"),
    works("LearningRateFinder", f"{RESTORE}test_a_learning_rate_finder_leaves_nothing_of_its_training"),
    callback("LearningRateMonitor"),
    callback("ModelCheckpoint", "As under DDP, with directories; `save_on_exception=True` is refused."),
    refused("ModelPruning", f"{REFUSED}[ModelPruning]", "Prune a consolidated model instead."),
    callback("ModelSummary", "Counts whole parameters, not this process's parts."),
    refused(
        "OnExceptionCheckpoint",
        f"{REFUSED}[OnExceptionCheckpoint]",
        "All processes write a checkpoint together, so it would wait in vain for those without the exception.",
    ),
    works("ProgressBar", f"{CALLBACK}[TQDMProgressBar]"),
    callback("RichModelSummary"),
    callback("RichProgressBar"),
    works(
        "StochasticWeightAveraging",
        f"{RESTORE}test_stochastic_weight_averaging_is_the_mean_of_the_weights_at_the_end_of_epochs",
        "Also averages layers that `configure_model` builds, which it does not under DDP.",
    ),
    callback("SpikeDetection"),
    refused(
        "ThroughputMonitor",
        f"{REFUSED}[ThroughputMonitor]",
        "With T > 1 its totals would be T times too large; use `tedlab.callbacks.StepMetrics`. With T = 1 it works.",
    ),
    callback("Timer"),
    callback("TQDMProgressBar"),
    works(
        "EMAWeightAveraging",
        f"{RESTORE}test_an_exponential_moving_average_is_that_of_the_weights_of_each_step",
        "Sharded, like the model; its state survives a change of layout.",
    ),
    works(
        "WeightAveraging", f"{RESTORE}test_a_mean_of_weights_is_the_mean_of_each_step_s", "Like `EMAWeightAveraging`."
    ),
]

_LOGGER = f"{ARGUMENT}[log_every_n_steps]"
LOGGERS = [
    works(name, _LOGGER, "Process 0 logs.")
    for name in ("LitLogger", "CometLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger")
]
LOGGERS.insert(2, callback("CSVLogger", "Process 0 writes."))

PROFILERS = [
    works("Profiler", f"{ARGUMENT}[profiler]"),
    works("AdvancedProfiler", f"{ARGUMENT}[profiler]"),
    works("PassThroughProfiler", f"{ARGUMENT}[profiler]"),
    works("PyTorchProfiler", f"{ARGUMENT}[PyTorchProfiler]"),
    works("SimpleProfiler", f"{ARGUMENT}[profiler]"),
    refused(
        "XLAProfiler",
        f"{REFUSED}[XLAProfiler]",
        "Lightning refuses it without its package; TEDStrategy does not run on TPUs.",
    ),
]

_IO = "TEDStrategy writes a directory through torch.distributed.checkpoint."
_OTHER_PRECISION = "TEDStrategy does not support this precision."
PLUGINS = [
    refused(
        "AsyncCheckpointIO",
        f"{REFUSED}[AsyncCheckpointIO]",
        "Use `CheckpointOptions(async_save=True)`.",
    ),
    refused("CheckpointIO", f"{REFUSED}[CheckpointIO]", _IO),
    refused("TorchCheckpointIO", f"{REFUSED}[CheckpointIO]", _IO),
    refused("XLACheckpointIO", f"{REFUSED}[CheckpointIO]", _IO),
    refused("BitsandbytesPrecision", f"{REFUSED}[precision]", _OTHER_PRECISION),
    refused("DeepSpeedPrecision", f"{REFUSED}[DeepSpeedPrecision]", _OTHER_PRECISION),
    works("DoublePrecision", f"{ARGUMENT}[plugins]"),
    works("HalfPrecision", f"{RESTORE}test_averaging_goes_on_from_a_checkpoint_as_if_nothing_had_been[bf16-true]"),
    works("MixedPrecision", "tests/optim/test_sharded.py::test_every_precision_stays_close_to_float64[bf16-mixed]"),
    works("Precision", f"{STRATEGY}test_the_strategy_is_known_by_name_and_single_precision_trains"),
    refused("TransformerEnginePrecision", f"{REFUSED}[precision]", _OTHER_PRECISION),
    refused("FSDPPrecision", f"{REFUSED}[FSDPPrecision]", _OTHER_PRECISION),
    refused("XLAPrecision", f"{REFUSED}[precision]", _OTHER_PRECISION),
    refused("LayerSync", f"{REFUSED}[sync_batchnorm]", "Refused if there is batch norm to synchronise."),
    refused("TorchSyncBatchNorm", f"{REFUSED}[sync_batchnorm]", "Refused if there is batch norm to synchronise."),
]

FEATURES = [
    works("a module that is not tedlab's", f"{STRATEGY}test_a_module_of_the_user_s_own_trains_as_in_one_process"),
    works("`ckpt_path='best'`, `'last'`, `'hpc'`", f"{RESTORE}test_best_and_last_are_found"),
    works(
        "weights-only checkpoints",
        f"{RESTORE}test_weights_alone_can_be_validated_tested_and_predicted_with",
        "For `validate`, `test`, `predict`; refused by `fit`, as under DDP.",
    ),
    works(
        "resuming under another layout",
        "tests/test_checkpoint.py::test_a_run_continues_under_another_layout_as_if_uninterrupted",
        "DDP cannot do this.",
    ),
    works(
        "several optimizers, by hand",
        "tests/lightning/test_gradients.py::test_several_optimizers_each_clip_their_own_and_zero_grad_forgets",
    ),
    hook("ReduceLROnPlateau", cell="ReduceLROnPlateau"),
    hook("no optimizer", cell="no optimizer"),
    works(
        "freezing, thawing and adding parameters while training",
        "tests/lightning/test_trained_parameters.py::test_parameters_move_when_torch_would_move_them",
    ),
    works(
        "clipping, masking and zeroing gradients by hand",
        "tests/lightning/test_gradients.py::test_clipping_by_hand_works_however_gradients_are_reduced",
    ),
    hook("tied parameters, modules used twice", cell="tied"),
    works(
        "frozen and unused parameters",
        "tests/lightning/test_trained_parameters.py::test_parameters_move_when_torch_would_move_them[unused]",
        "They stay as they are, as with `find_unused_parameters`.",
    ),
    hook("batch norm", "As under DDP: all processes get the running statistics of process 0.", "batch norm"),
    hook("parameters of several dtypes", cell="mixed"),
    hook("compiled layers", cell="compiled"),
    works("shuffled loaders", f"{ARGUMENT}[shuffle]"),
    refused(
        "a compiled LightningModule", f"{REFUSED}[compiled module]", "Lightning refuses it; compile layers instead."
    ),
    refused("lazy layers", f"{REFUSED}[lazy]", "Refused as under DDP; give the sizes."),
    refused("complex parameters", f"{REFUSED}[complex]", "Use two real parameters."),
    refused("sparse gradients", f"{REFUSED}[sparse]", "Use `sparse=False`."),
    refused(
        "optimizers of whole matrices",
        f"{REFUSED}[Muon]",
        "LBFGS, Muon, …: their state cannot be sharded as a flat vector.",
    ),
]

SECTIONS = {
    "Arguments of Trainer": TRAINER,
    "LightningModule": MODULE,
    "LightningDataModule": DATA,
    "Hooks of Callback": CALLBACK_HOOKS,
    "Callbacks": CALLBACKS,
    "Loggers": LOGGERS,
    "Profilers": PROFILERS,
    "Plugins": PLUGINS,
    "What else a module may do": FEATURES,
}

_HEAD = """# Lightning under TEDStrategy

This page has a row for every argument of Lightning's `Trainer`, every method and hook, and every callback, logger,
profiler and plugin that comes with Lightning {version}. Each of them works under `TEDStrategy`, or every process
refuses it with a sentence before the first step. Each row names its test. Most tests run the same module twice and
compare what it saw, what it logged and what it became: under Lightning's own DDP in two processes, and under
TEDStrategy in four (tensor 2 × expert 2, which has two data ranks as well).

`python -m tests.lightning.contract` writes this page. `tests/lightning/test_contract.py` fails if the page differs from
the table there, if a test does not exist, or if the installed Lightning has a name without a row.
"""


def render() -> str:
    """The page."""
    parts = [_HEAD.format(version=".".join(lightning.__version__.split(".")[:2]))]
    for heading, rows in SECTIONS.items():
        parts.append(f"\n## {heading}\n\n| name | | under TEDStrategy | test |\n|---|---|---|---|\n")
        for row in rows:
            file, test = row.test.split("::")
            case = test[test.index("[") + 1 : -1] if "[" in test else test.removeprefix("test_").replace("_", " ")
            name = row.name if " " in row.name else f"`{row.name}`"
            verdict = "works" if row.works else "**refused**"
            parts.append(f"| {name} | {verdict} | {row.note} | [{Path(file).stem}](../{file}): {case} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
