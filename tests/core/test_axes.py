"""Every variable that the channel-axis analysis finds is proven by permuting; what is not one is fixed for a reason."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from core import axes_models as nets
from core.axes_models import TOKENS, WIDTH, Apply, Attention, Convolution, Feed, Net, Norm, moved, prove, summary
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Encoder, Gated, made, random
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO

from sparsec.axes import Axes, analyse
from sparsec.axes import rules as axis_rules
from sparsec.axes.atoms import Atoms
from sparsec.axes.moves import apply
from sparsec.axes.sizes import Size
from sparsec.axes.structure import Leaf, Product, leaves, length
from sparsec.errors import UsageError
from sparsec.passes.mask import Mask
from sparsec.pipeline import PassManager
from sparsec.program import Program
from sparsec.tracing import trace

SECONDS_OF_TWELVE_LAYERS = 2.0


def traced(*blocks: nn.Module) -> Program:
    return trace(made(lambda: Net(*blocks)), {"x": random(2, TOKENS, 5)})


def proven(*blocks: nn.Module) -> Axes:
    return prove(traced(*blocks))


def width(axes: Axes) -> set[str]:
    """What follows when the width of a Net is permuted; nothing when it is fixed."""
    return next((names for names in moved(axes).values() if "first.weight:0" in names), set())


# Architectures: what is found, and that it is true.

FOUND = {
    "bert": "free 4, order 2, within 4",
    "distilbert": "free 4, order 2, within 4",
    "roberta": "free 4, order 2, within 4",
    "albert": "free 4, order 1, within 2",  # both layers are one
    "deberta-v3like": "free 4, order 2, within 4",
    "gpt2": "free 3, order 2, within 4",  # free: two feed-forward layers and the residual
    "opt": "free 4, order 2, within 4",
    "modernbert": "free 4, order 2, within 2",  # rotary: queries and keys are fixed inside a head
    "llama": "free 3, order 2, order/head 2, within 2",  # order/head: query heads that share a key head
    "qwen2": "free 3, order 2, order/head 2, within 2",
    "gemma": "free 3, order 2, order/head 2, within 2",
    "bloom": "free 3, within 4",  # ALiBi gives every head its own slope
    "mamba": "free 7",
    "t5": "free 4, order 3, within 12",  # the residual is an output: encoder_last_hidden_state
    "bart": "free 4, order 6, within 12",
    "vit": "free 3, order 2, within 4",
    "deit": "free 3, order 2, within 4",
    "clip": "free 6, order 4, within 8",
}


FAST = ("bert", "albert", "gpt2", "llama", "modernbert", "vit")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FOUND])
def test_every_variable_of_an_architecture_is_proven(name: str) -> None:
    case = ZOO[name]()

    axes = prove(trace(case.model, case.inputs, case.dynamic, case.limits))

    assert FOUND[name] == summary(axes)


def test_a_bert_layer_has_the_variables_that_one_expects() -> None:
    axes = prove(trace(made(Encoder), {"tokens": torch.tensor([[1, 2, 3], [4, 5, 6]])}))

    attention = {f"{layer}.{kind}:0" for layer in ("query", "key", "value") for kind in ("weight", "bias")}
    assert {
        "query.weight:0": attention | {"out.weight:1"},
        "query.weight:0/2": {name for name in attention if "value" not in name},
        "value.weight:0": {"value.weight:0", "value.bias:0", "out.weight:1"},
        "up.weight:0": {"up.weight:0", "up.bias:0", "down.weight:1"},
    } == moved(axes)
    assert ["order", "within", "within", "free"] == [variable.kind for variable in axes.variables]
    assert [(2,), (2, 2), (2, 2), (6,)] == [variable.shape for variable in axes.variables]
    assert "output hidden" in axes.fixed.values()


def test_a_site_knows_what_permutes_its_rows_and_columns() -> None:
    program = trace(made(Encoder), {"tokens": torch.tensor([[1, 2, 3], [4, 5, 6]])})
    axes = analyse(program)
    order, _, inside, hidden = axes.variables

    assert Product((Leaf(order.atom, 2), Leaf(inside.atom, 2))) == axes.columns(program.sites["out.weight"])
    assert Leaf(hidden.atom, 6) == axes.rows(program.sites["up.weight"])
    (residual,) = leaves(axes.columns(program.sites["up.weight"]))
    assert axes.variable(residual.atom) is None
    assert axes.fixed[residual.atom] == "output hidden"


def test_one_residual_runs_through_three_blocks() -> None:
    axes = proven(Feed(), Attention(), Feed(gated=True))

    assert {"first.weight:0", "blocks.0.norm.weight:0", "blocks.1.query.weight:1", "blocks.1.out.weight:0"} < width(
        axes
    )
    assert {"blocks.2.up.weight:1", "blocks.2.down.bias:0", "head.weight:1"} < width(axes)


def test_an_output_fixes_the_residual() -> None:
    program = trace(made(Gated), {"x": random(2, 4)})

    assert ["gate.weight:0"] == list(moved(prove(program)))


# Hostile graphs.


@pytest.mark.parametrize("sdpa", [True, False], ids=["sdpa", "softmax"])
@pytest.mark.parametrize("fused", ["no", "chunk", "view"])
def test_attention_by_view_and_transpose(sdpa: bool, fused: nets.Fused) -> None:
    axes = proven(Attention(sdpa, fused))

    assert "free 1, order 1, within 2" == summary(axes)
    assert [(2, 4), (2, 4)] == [variable.shape for variable in axes.variables if variable.kind == "within"]


@pytest.mark.parametrize("fused", ["no", "chunk"])
def test_key_heads_move_with_the_query_heads_they_serve(fused: nets.Fused) -> None:
    axes = proven(Attention(fused=fused, served=3))

    orders = [variable for variable in axes.variables if variable.kind == "order"]
    assert {(2,), (2, 3)} == {variable.shape for variable in orders}
    assert "free 1, order 1, order/head 1, within 2" == summary(axes)


@pytest.mark.parametrize("fused", ["no", "chunk", "view"])
def test_rotary_embeddings_fix_queries_and_keys_inside_a_head(fused: nets.Fused) -> None:
    axes = proven(Attention(fused=fused, rope=True))

    assert "free 1, order 1, within 1" == summary(axes)
    assert "constant blocks.0.frequencies" in axes.fixed.values()


def test_a_softmax_inside_heads_lets_heads_differ_and_one_across_heads_lets_channels_differ() -> None:
    inside, across = (proven(nets.Heads(across=across)) for across in (False, True))

    assert {(8,), (2,), (2, 4)} == {variable.shape for variable in inside.variables}
    assert {(8,), (4, 2), (4,)} == {variable.shape for variable in across.variables}


def test_a_tied_embedding_moves_once() -> None:
    axes = prove(trace(made(nets.TiedEmbedding), {"tokens": torch.tensor([[1, 2], [3, 4]])}))

    assert "free 2" == summary(axes)
    assert 1 == sum(name.startswith("table.weight") for names in moved(axes).values() for name in names)


def test_a_layer_called_twice_is_permuted_once() -> None:
    assert "free 2" == summary(proven(nets.Twice(Feed())))


def test_a_weight_used_on_both_sides_has_one_permutation() -> None:
    assert {"first.weight:0", "first.bias:0", "blocks.0.weight:0", "blocks.0.weight:1", "head.weight:1"} == width(
        proven(nets.Square())
    )


@pytest.mark.parametrize("groups", [2, 4])
def test_group_norm_splits_the_width_in_groups(groups: int) -> None:
    axes = proven(Feed(), Norm(groups))

    assert {(groups,), (groups, WIDTH // groups), (6,)} == {variable.shape for variable in axes.variables}


def test_halves_of_a_gated_layer_move_alike() -> None:
    hidden = next(v for v in proven(Feed(gated=True)).variables if v.size == 6)

    assert 12 == length(hidden.moves[0].structures[0])
    assert 2 == list(leaves(hidden.moves[0].structures[0])).count(Leaf(hidden.atom, 6))


def test_experts_have_a_permutation_each() -> None:
    assert {(WIDTH,), (2,), (2, 6)} == {variable.shape for variable in proven(nets.Experts()).variables}


@pytest.mark.parametrize("groups", [1, 2, WIDTH])
def test_convolutions_and_batch_norm_follow_the_width(groups: int) -> None:
    assert width(proven(Convolution(groups))) >= {"first.weight:0", "blocks.0.norm.running_mean:0", "head.weight:1"}


def test_names_that_differ_by_punctuation_are_kept_apart() -> None:
    axes = prove(trace(made(nets.Punctuation), {"x": random(2, 5)}))

    assert {"a.b.weight:0", "a.b.bias:0", "a_b.weight:1"} == moved(axes)["a.b.weight:0"]
    assert {"a_b.weight:0", "a_b.bias:0", "a_b_1.weight:1"} == moved(axes)["a_b.weight:0"]


FIXES = {
    "cumsum": lambda x: x.cumsum(-1),
    "argsort": lambda x: x + x.argsort(-1),
    "topk": lambda x: x + x.topk(2, -1).values.sum(-1, keepdim=True) * x.argmax(-1, keepdim=True),
    "sort": lambda x: x + x.sort(-1).values,
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "ranked": lambda x: x * torch.arange(WIDTH),
    "triangle": lambda x: x.tril(),
    "element": lambda x: x * x[..., 3:4] * x[..., 0, None],
    "strided": lambda x: x + x[..., ::2].repeat(1, 1, 2),
    "looked up": lambda x: x[..., torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])],
    "pad": lambda x: functional.pad(x, (1, 0))[..., :WIDTH],
    "uneven": lambda x: x + x.reshape(-1, 4, 6).softmax(-1).reshape(-1, TOKENS, WIDTH),
    "shifted": lambda x: torch.cat([x[..., 1:], x[..., :1]], -1) + x,
}


@pytest.mark.parametrize("name", FIXES)
def test_what_depends_on_the_order_of_channels_fixes_them(name: str) -> None:
    assert set() == width(proven(Apply(FIXES[name])))


ALLOWS = {
    "sum": lambda x: x + x.sum(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "largest": lambda x: x - x.amax(-1, keepdim=True),
    "tokens": lambda x: x.cumsum(1) + x.flip(1),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)).masked_fill(x > 1, 2.0),
    "product": lambda x: torch.einsum("btc,bsc->bts", x, x).softmax(-1) @ x,
    "repeated": lambda x: x + x[:, :1].expand(-1, TOKENS, -1) * x[:, 0].repeat(1, 2).view(-1, 2, WIDTH)[:, 1:],
    "out and back": lambda x: x.permute(2, 0, 1).unsqueeze(0).squeeze(0).movedim(0, 2).contiguous(),
}


@pytest.mark.parametrize("name", ALLOWS)
def test_what_treats_channels_alike_leaves_them_free(name: str) -> None:
    assert {"first.weight:0", "first.bias:0", "head.weight:1"} == width(proven(Apply(ALLOWS[name])))


def test_a_sum_over_part_of_an_axis_keeps_the_parts_apart() -> None:
    axes = proven(Apply(lambda x: x * x[..., :3].sum(-1, keepdim=True)))

    assert {(3,), (5,)} == {variable.shape for variable in axes.variables}


def test_layer_norm_over_two_axes_leaves_each_free() -> None:
    assert {(WIDTH,), (6,)} == {variable.shape for variable in proven(nets.TwoDims(), Feed()).variables}


def test_a_constant_fixes_the_channels_it_meets() -> None:
    axes = proven(nets.Constant())

    assert set() == width(axes)
    assert "constant blocks.0.scale" in axes.fixed.values()


def test_channels_flattened_with_tokens_move_alike_in_every_token() -> None:
    axes = proven(nets.Flatten())

    assert {"blocks.0.mix.weight:1", "blocks.0.back.weight:0", "head.weight:1"} < width(axes)
    assert {(WIDTH,), (6,)} == {variable.shape for variable in axes.variables}


@pytest.mark.parametrize("operator", ["gelu", "layer_norm", "add"])
def test_an_operator_without_a_rule_fixes_all_it_touches(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(Feed())
    monkeypatch.delitem(axis_rules.RULES, operator)

    axes = prove(program)

    assert {"gelu": {(WIDTH,)}, "layer_norm": {(6,)}, "add": {(6,)}}[operator] == {v.shape for v in axes.variables}
    assert any(why.startswith(f"{operator}.") for why in axes.fixed.values())


def test_a_rule_whose_sizes_do_not_fit_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(Feed())
    monkeypatch.setitem(axis_rules.RULES, "gelu", lambda call: call.dims("self")[::-1])

    assert {(WIDTH,)} == {variable.shape for variable in analyse(program).variables}


# The proof itself.


@pytest.mark.parametrize("wrong", ["cumsum", "flip"])
def test_the_proof_catches_a_wrong_rule(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(Apply(FIXES[wrong]))
    monkeypatch.setitem(axis_rules.RULES, wrong, axis_rules.RULES["relu"])

    with pytest.raises(AssertionError, match="changes output"):
        prove(program)


def test_the_proof_catches_heads_that_are_permuted_apart_where_they_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(nets.Heads(across=True))
    monkeypatch.setitem(axis_rules.RULES, "softmax", axis_rules.RULES["relu"])

    with pytest.raises(AssertionError, match="changes output"):
        prove(program)


@pytest.mark.parametrize(
    "block", [Feed(gated=True), Attention(served=2), Norm(2), nets.Experts()], ids=lambda b: str(type(b))
)
def test_a_move_left_out_changes_the_outputs(block: nn.Module) -> None:
    program = traced(block)
    generator = torch.Generator().manual_seed(0)
    reference = nets.in_double(program, generator)
    for variable in analyse(program).variables:
        partial = dataclasses.replace(variable, moves=variable.moves[1:])
        changed = apply(reference, partial, nets.shuffled(variable, generator))

        assert nets.difference(nets.run(reference)["output"], nets.run(changed)["output"]) > nets.DETECTABLE


# Applying.


def test_apply_leaves_the_program_as_it_is() -> None:
    program = traced(Feed())
    (hidden,) = [variable for variable in analyse(program).variables if variable.size == 6]
    before = {name: value.clone() for name, value in program.module.named_parameters()}

    after = apply(program, hidden, torch.arange(6).flip(0))

    assert all(torch.equal(value, before[name]) for name, value in program.module.named_parameters())
    found: dict[str, Tensor] = dict(after.module.named_parameters())
    assert torch.equal(before["blocks.0.up.weight"].flip(0), found["blocks.0.up.weight"])
    assert torch.equal(before["blocks.0.down.weight"].flip(1), found["blocks.0.down.weight"])
    assert found["blocks.0.up.weight"].requires_grad
    assert program.dump() == after.dump()


def test_permuting_and_permuting_back_is_the_identity() -> None:
    program = traced(Attention(served=2))
    for variable in analyse(program).variables:
        permutation = nets.shuffled(variable, torch.Generator().manual_seed(1))

        back = apply(apply(program, variable, permutation), variable, permutation.argsort(-1))

        for name, value in program.module.named_parameters():
            assert torch.equal(value, dict(back.module.named_parameters())[name]), (variable.name, name)


@pytest.mark.parametrize(
    ("permutation", "says"),
    [
        (torch.arange(5), r"expected whole numbers of shape \(6,\)"),
        (torch.arange(6.0), "found torch.float32"),
        (torch.tensor([0, 1, 2, 3, 4, 4]), "every number from 0 to 5 once"),
    ],
)
def test_apply_refuses_what_is_no_permutation(permutation: Tensor, says: str) -> None:
    program = traced(Feed())
    (hidden,) = [variable for variable in analyse(program).variables if variable.size == 6]

    with pytest.raises(UsageError, match=says):
        apply(program, hidden, permutation)


def test_apply_refuses_a_weight_whose_pattern_is_chosen() -> None:
    program = traced(Feed())
    (hidden,) = [variable for variable in analyse(program).variables if variable.size == 6]
    program = program.replace(sites=program.sites.with_targets({"*": "2:4"}))
    masked = PassManager([Mask()]).run(program)

    with pytest.raises(UsageError, match="permute before"):
        apply(masked, hidden, torch.arange(6))
    assert "constant blocks.0.up.weight_mask" in analyse(masked).fixed.values()


def test_twelve_layers_are_analysed_in_two_seconds() -> None:
    program = traced(*(block for _ in range(12) for block in (Attention(), Feed())))

    start = time.process_time()
    axes = analyse(program)

    assert "free 13, order 12, within 24" == summary(axes)
    assert time.process_time() - start < SECONDS_OF_TWELVE_LAYERS


# Laws.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12*batch", Size(12, ("batch",))),
        ("batch*length**2", Size(1, ("batch", "length", "length"))),
        ("768*length + 768", Size(768, ("length + 1",))),
        ("batch*length + batch", Size(1, ("batch", "length + 1"))),
        ("2*(a - 1)", Size(2, ("a + -1",))),
        ("Max(1, length//2)", Size(1, ("Max(1, length // 2)",))),
    ],
)
def test_sizes_are_read_as_products(text: str, size: Size) -> None:
    assert size == Size.parse(text)


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4), st.data())
def test_views_that_fit_split_atoms_and_fix_nothing(factors: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(factors)), max_size=3)) | {len(factors)}
    atoms, view, start = Atoms(), [], 0
    for end in sorted(cuts):
        view.append(Size(torch.tensor(factors[start:end]).prod().item()))
        start = end
    axis = atoms.new(Size(torch.tensor(factors).prod().item()))

    split = atoms.regroup(axis, [Size(factor) for factor in factors], "")
    joined = atoms.regroup(axis, view, "")

    assert [Size(factor) for factor in factors] == [atoms.size(part) for part in split]
    assert view == [atoms.size(part) for part in joined]
    assert all(atoms.why(atom) is None for atom in atoms.flat(axis))


SYMMETRIC = sorted(FIXES.keys() - {"argsort", "topk"}) + sorted(ALLOWS)  # integers made of floats: not continuous


def blocks() -> st.SearchStrategy[nn.Module]:
    functions = {**FIXES, **ALLOWS}
    simple = st.one_of(
        st.builds(Feed, st.booleans()),
        st.builds(Attention, st.booleans(), st.sampled_from(["no", "chunk", "view"]), st.integers(1, 3), st.booleans()),
        st.builds(Norm, st.sampled_from([1, 2, 4])),
        st.builds(Convolution, st.sampled_from([1, 2, WIDTH])),
        st.builds(nets.Heads, st.sampled_from([2, 4]), st.booleans()),
        st.sampled_from([nets.Square, nets.TwoDims, nets.Flatten, nets.Experts]).map(lambda make: make()),
        st.sampled_from(SYMMETRIC).map(lambda name: Apply(functions[name])),
    )
    return st.one_of(simple, simple, simple, st.builds(nets.Twice, simple))


@settings(max_examples=12)
@given(st.lists(blocks(), min_size=1, max_size=4))
def test_every_variable_of_a_random_net_is_proven(parts: list[nn.Module]) -> None:
    proven(*parts)


@settings(max_examples=12)
@given(nets.steps())
def test_every_variable_of_a_random_walk_over_operators_is_proven(steps: list[nets.Step]) -> None:
    prove(trace(made(lambda: nets.Walk(steps)), {"x": random(2, TOKENS, 5)}))
