"""Sizes at which the code goes on in pieces, or with another dtype: a small run meets each, or a named test does.

A certificate proves the code that it runs. What is only reached beyond a size must be reached by something.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tedlab

SOURCE = Path(tedlab.__file__).parent
TESTS = Path(__file__).parent.parent
COMPUTING = ("comm", "models", "moe", "nn", "optim")
PIECES = "certify/test_shrink.py::test_whatever_is_divided_has_several_pieces_and_an_uneven_last_one"
THRESHOLDS = {  # what is found in the code: the test that crosses it
    "nn/attend.py _ROWS": "nn/test_attention.py::test_attention_in_blocks_is_attention_at_once",
    "nn/attend.py _SHAPES": "test_compat.py::test_a_function_is_compiled_for_as_many_shapes_as_are_asked_for",
    "nn/attend.py _NARROWEST": (
        "nn/test_attention.py::test_the_fused_kernel_is_taken_wherever_it_can_be_and_flex_where_its_kernels_can"
    ),
    "nn/sharded.py _BLOCK_ELEMENTS": "nn/test_sharded.py::test_no_two_places_hold_the_same_values",
    "optim/groups.py _SHOWN": (
        "lightning/test_groups.py::test_a_group_without_a_meaning_is_refused_before_anything_starts"
    ),
    "models/families/deepseek.py _PREDICTED": (
        "exchange/test_exchange.py::test_blocks_that_predict_further_tokens_are_no_part_of_the_model"
    ),
    "models/families/family.py _MOST_LAYERS": (
        "exchange/test_exchange.py::test_a_number_of_layers_that_no_model_has_is_refused"
    ),
    "optim/sharded.py bucket_elements": PIECES,
    "optim/sharded.py piece": PIECES,
    "optim/fused.py _TILE": "optim/test_fused.py::test_steps_equal_torchs_in_float64",
    "optim/adam_kernel.py _BLOCK": "optim/test_fused.py::test_interpreted_kernel_equals_torchs_in_float64",
    "optim/muon.py NS_STEPS": "optim/test_muon.py::test_newton_schulz_is_a_polynomial_of_singular_values",
    "optim/fused.py TILE": PIECES,
    "optim/rounding.py _BITS": "optim/test_narrow.py::test_stochastic_rounding_has_no_bias_and_leaves_less_than_a_unit",
    "optim/rounding.py int32": "optim/test_narrow.py::test_bits_are_even_and_depend_on_seed_step_and_element_alone",
    "optim/loss_scale.py growth_interval": (
        "optim/test_loss_scale.py::test_the_scale_doubles_after_so_many_steps_without_overflow"
    ),
    "moe/row_kernels.py _COLUMNS": (
        "moe/test_row_kernels.py::test_kernels_are_as_far_from_float64_as_the_dtype_makes_them"
    ),
    "moe/grouped.py _ALIGNMENT": (
        "moe/test_ragged.py::test_grouped_products_are_those_of_each_row_with_its_experts_matrix"
    ),
    "capacity.py MIN_CAPACITY": "moe/test_deepspeed_gating.py::test_capacity",
    "moe/slots.py uint8": "moe/test_router.py::test_choices_of_any_number_of_experts_are_sorted",
    "moe/slots.py int16": "moe/test_router.py::test_choices_of_any_number_of_experts_are_sorted",
    "moe/slots.py int32": "moe/test_router.py::test_choices_of_any_number_of_experts_are_sorted",
    "moe/evaluating.py _ROWS": "moe/test_evaluating.py::test_experts_in_pieces_compute_what_training_does",
    "moe/precise.py int32": "moe/test_router.py::test_three_numbers_in_bf16_are_one_in_fp32",
    "moe/router.py _STREAMS": "moe/test_routers.py::test_layers_draw_other_numbers",
    "moe/choice_kernels.py _ELEMENTS": "moe/test_choice_kernels.py::test_the_kernel_chooses_as_plain_torch_does",
    "moe/index_kernels.py _ROWS": "moe/test_index_kernels.py::test_the_kernels_list_what_plain_torch_does",
    "moe/index_kernels.py _PROGRAMS": "moe/test_index_kernels.py::test_the_kernels_list_what_plain_torch_does",
    "moe/index_kernels.py int32": "moe/test_index_kernels.py::test_the_kernels_list_what_plain_torch_does",
    "moe/choice_kernels.py int32": "moe/test_choice_kernels.py::test_the_kernel_chooses_as_plain_torch_does",
}
SETTINGS = {  # those that a user chooses, which are made small
    "optim.tile": PIECES,
    "optim.bucket_elements": PIECES,
    "model.loss_chunk": PIECES,
    "moe.capacity_multiple": (
        "certify/test_shrink.py::test_tensor_ranks_cannot_divide_slots_or_rows_and_some_tokens_are_dropped"
    ),
}


def found_in(file: Path) -> Iterator[str]:
    """Constants above 1 of a module, large defaults of arguments, and narrow integers."""
    name = file.relative_to(SOURCE).as_posix()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            if (_number(node.value) or 0) > 1:
                yield f"{name} {node.targets[0].id}"
        elif isinstance(node, ast.arguments):
            positional = node.args[len(node.args) - len(node.defaults) :]
            for argument, default in zip(
                [*positional, *node.kwonlyargs], [*node.defaults, *node.kw_defaults], strict=True
            ):
                if default is not None and (_number(default) or 0) >= 1000:
                    yield f"{name} {argument.arg}"
        elif isinstance(node, ast.Attribute) and node.attr in ("uint8", "int8", "int16", "int32"):
            yield f"{name} {node.attr}"


def _number(node: ast.expr) -> int | None:
    text = ast.unparse(node)
    return eval(text) if re.fullmatch(r"[\d_ <>*+-]+", text) else None


def test_every_size_at_which_the_code_changes_is_crossed_by_a_named_test() -> None:
    files = [
        SOURCE / "capacity.py",
        *(file for folder in COMPUTING for file in sorted((SOURCE / folder).rglob("*.py"))),
    ]
    assert {threshold for file in files for threshold in found_in(file)} == set(THRESHOLDS)


@pytest.mark.parametrize("test", sorted({*THRESHOLDS.values(), *SETTINGS.values()}))
def test_the_named_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (TESTS / file).read_text()
