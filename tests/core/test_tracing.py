"""A traced program computes what the model computes, bit for bit, and what cannot be traced is named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Classifier, Dropouts, Encoder, Gated, Residual, Tied, Transposed, made, random
from torch import Tensor, nn
from torch.nn import functional

from sparsec import Program, trace
from sparsec.errors import SparsecError, TraceError


def as_dict(outputs: Any) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    named = (
        outputs if isinstance(outputs, dict) else {f"output_{i}" if i else "output": v for i, v in enumerate(outputs)}
    )
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def assert_equal(model: nn.Module, program: Program, *args: Tensor, **kwargs: Tensor) -> None:
    """Not close: equal."""
    with torch.no_grad():
        expected, found = as_dict(model.eval()(*args, **kwargs)), program(*args, **kwargs)
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def tokens(*shape: int, seed: int = 0, vocabulary: int = 10) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# Outputs --------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "feed-forward": (Residual, (2, 5)),
    "classifier": (Classifier, (2, 5)),
    "tied weights": (Tied, (2, 6)),
    "gated": (Gated, (2, 4)),
    "addmm": (Transposed, (2, 4)),
    "dropout, attention and batch norm": (Dropouts, (3, 3, 4)),
}


@pytest.mark.parametrize(("net", "shape"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_program_equals_the_models_eval(net: type[nn.Module], shape: tuple[int, ...], mode: str) -> None:
    model = made(net).train(mode == "train")
    program = trace(model, (random(*shape),))

    assert (mode == "train") == model.training
    for batch in (1, 2, 7):
        assert_equal(made(net), program, random(batch, *shape[1:], seed=batch))


def test_outputs_of_a_dict_keep_their_names_and_order() -> None:
    program = trace(made(Encoder), (tokens(2, 3),))

    assert ["hidden", "pooled"] == list(program(tokens(2, 3)))
    assert_equal(made(Encoder), program, tokens(5, 3, seed=1))


class Returns(nn.Module):
    """Returns what the test asks for."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.fc, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x), x)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y, x: y, ["output"]),
        (lambda y, x: (y, y + 1), ["output", "output_1"]),
        (lambda y, x: [y, x], ["output", "output_1"]),
        (lambda y, x: (y, None, 3, y * 2), ["output", "output_3"]),
        (lambda y, x: {"b": y, "a": x, "cache": [y], "loss": None}, ["b", "a"]),
        (lambda y, x: {"same": y, "again": y}, ["same", "again"]),
    ],
    ids=["tensor", "tuple", "list", "with others", "dict", "one tensor twice"],
)
def test_outputs_are_named_tensors(make: Any, names: list[str]) -> None:
    model = made(lambda: Returns(make))
    program = trace(model, (random(2, 4),))

    assert names == list(program(random(2, 4)))
    assert_equal(model, program, random(3, 4, seed=1))


@pytest.mark.parametrize(
    "make", [lambda y, x: None, lambda y, x: {"n": 3}, lambda y, x: ()], ids=["None", "no tensor", "empty"]
)
def test_a_model_without_a_tensor_to_return_is_refused(make: Any) -> None:
    with pytest.raises(TraceError):
        trace(made(lambda: Returns(make)), (random(2, 4),))


# Modes ----------------------------------------------------------------------------------------------------------------


def test_train_mode_is_random_and_eval_mode_is_not() -> None:
    model, x = made(Dropouts), random(3, 3, 4)
    program = trace(model, (x,)).clone()
    program.set_mode("train")

    assert not torch.equal(program(x)["output"], program(x)["output"])
    program.set_mode("eval")
    assert torch.equal(program(x)["output"], program(x)["output"])


def test_attention_dropout_alone_is_random_in_train_mode() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)

    x = random(2, 2, 3, 4)
    program = trace(Attention(), (x,)).clone()
    assert_equal(Attention(), program, x)
    program.set_mode("train")
    assert not torch.equal(program(x)["output"], program(x)["output"])
    program.set_mode("eval")
    assert_equal(Attention(), program, x)


def test_train_mode_equals_the_models_train_mode_for_one_seed() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(4, 6), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.fc(x))

    model, x = made(Dropped), random(5, 4)
    program = trace(model, (x,)).clone()
    program.set_mode("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = model.train()(x)
        torch.manual_seed(1)
        assert torch.equal(expected, program(x)["output"])


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Residual, Classifier, Gated])
def test_parameters_are_the_models_own_under_their_own_names(net: type[nn.Module]) -> None:
    model = made(net)
    program = trace(model, (random(2, 4 if net is Gated else 5),))
    own = dict(model.named_parameters())

    assert own.keys() == dict(program.module.named_parameters()).keys()
    assert all(parameter is own[name] for name, parameter in program.module.named_parameters())


def test_the_model_is_left_as_it_was() -> None:
    model = made(Dropouts).train()
    model.drop.eval()
    state, modes = (
        {k: v.clone() for k, v in model.state_dict().items()},
        {n: m.training for n, m in model.named_modules()},
    )
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    trace(model, (random(3, 3, 4),))

    assert modes == {n: m.training for n, m in model.named_modules()}
    assert attributes == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_traced_is_left_as_it_was() -> None:
    model = made(lambda: Returns(lambda y, x: y if y.sum() > 0 else x))
    model.fc.train()
    modes = {n: m.training for n, m in model.named_modules()}

    with pytest.raises(TraceError):
        trace(model, (random(2, 4),))
    assert modes == {n: m.training for n, m in model.named_modules()}


def test_tied_weights_are_one_site_with_an_alias() -> None:
    program = trace(made(Tied), (random(2, 6),))

    assert ["first.weight"] == [site.name for site in program.sites]
    assert (("second.weight",), 2) == (program.sites["first.weight"].aliases, len(program.sites["first.weight"].users))


def test_a_layer_called_twice_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(torch.relu(self.fc(x)))

    program = trace(made(Twice), (random(2, 4),))

    assert [2] == [len(site.users) for site in program.sites]
    assert_equal(made(Twice), program, random(1, 4))


def test_buffers_and_constants_travel_with_the_program() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.arange(4.0))
            self.register_buffer("hidden", torch.ones(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.kept + self.hidden + torch.tensor([1.0, 2.0, 3.0, 4.0])

    program = trace(Buffers(), (random(2, 4),))

    assert {"kept", "hidden"} <= dict(program.module.named_buffers()).keys()
    assert_equal(Buffers(), program, random(3, 4))


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_batch_and_length_may_vary_within_their_limits() -> None:
    program = trace(made(Encoder), {"tokens": tokens(2, 3)}, {"tokens": {0: "batch", 1: "length"}}, {"length": 16})

    assert {"batch": (1, None), "length": (1, 16)} == program.dims
    assert "int64[batch, length]" in program.dump()
    for batch, length in [(1, 1), (1, 16), (4, 5)]:
        assert_equal(made(Encoder), program, tokens(batch, length))


def test_an_example_of_size_one_does_not_fix_the_size() -> None:
    program = trace(made(Residual), (random(1, 5),))

    assert (2, 5) == tuple(program.inputs["x"].shape)
    for batch in (1, 3):
        assert_equal(made(Residual), program, random(batch, 5))


def test_sizes_may_all_be_fixed() -> None:
    program = trace(made(Residual), (random(2, 5),), dynamic={})

    assert {} == program.dims
    assert "float32[2, 5]" in program.dump()


@pytest.mark.parametrize(
    ("dynamic", "limits"),
    [({"y": {0: "batch"}}, None), ({"x": {2: "batch"}}, None), ({"x": {0: "batch"}}, {"bach": 3})],
    ids=["input", "axis", "limit"],
)
def test_a_dynamic_size_of_something_that_is_not_there_is_refused(dynamic: Any, limits: Any) -> None:
    with pytest.raises(SparsecError):
        trace(made(Residual), (random(2, 5),), dynamic, limits)


def test_a_size_the_model_fixes_is_said() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.positions

    with pytest.raises(TraceError, match=r"Fixed cannot be captured .*`dynamic`"):
        trace(Fixed(), (random(2, 3, 4),), {"x": {1: "length"}})


@pytest.mark.parametrize("inputs", [(), {}, (3,), {"x": "text"}, (torch.ones(2, 5),) * 2], ids=repr)
def test_inputs_that_are_no_tensors_are_refused(inputs: Any) -> None:
    with pytest.raises(TraceError):
        trace(made(Residual), inputs)


# What cannot be traced ------------------------------------------------------------------------------------------------


def test_control_flow_that_depends_on_data_is_refused_with_advice() -> None:
    model = made(lambda: Returns(lambda y, x: y if bool(y.sum() > 0) else x))

    with pytest.raises(TraceError, match=r"Returns cannot be captured as one graph: .*torch\.where") as caught:
        trace(model, (random(2, 4),))
    assert "\n" not in str(caught.value)


class DropPath(nn.Module):
    """Stochastic depth, as vision models write it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        return x * torch.rand(x.shape[0], 1, device=x.device).add(1 - self.drop_prob).floor()


class Jitter(DropPath):
    """The same under a name that says nothing."""


class Deep(nn.Module):
    """A residual layer whose branch is dropped at random."""

    def __init__(self, path: nn.Module) -> None:
        super().__init__()
        self.fc, self.path, self.layerdrop = nn.Linear(4, 4), path, 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
            return x
        return x + self.path(self.fc(x))


def test_random_depth_is_switched_off_and_listed() -> None:
    model = made(lambda: Deep(DropPath(0.3)))
    program = trace(model, (random(2, 4),))

    assert ["layerdrop", "path.drop_prob"] == sorted(program.origin["set_to_zero"])
    assert (0.5, 0.3) == (model.layerdrop, model.path.drop_prob)
    assert_equal(model, program, random(3, 4))


def test_other_randomness_is_refused_by_the_modules_name() -> None:
    model = made(lambda: Deep(Jitter(0.3)))

    with pytest.raises(TraceError, match=r"^path draws random numbers \(aten\.rand"):
        trace(model, (random(2, 4),))
    assert 0.5 == model.layerdrop
    model.path.drop_prob = 0.0
    assert_equal(model, trace(model, (random(2, 4),)), random(3, 4))


def write_slice(y: Tensor, x: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return y


def write_column(y: Tensor, x: Tensor) -> Tensor:
    y[:, 1] = x[:, 1]
    return y * 2


def add_in_place(y: Tensor, x: Tensor) -> Tensor:
    y.add_(1.0)
    return y


def relu_in_place(y: Tensor, x: Tensor) -> Tensor:
    return functional.relu(y, inplace=True)


def masked_fill_in_place(y: Tensor, x: Tensor) -> Tensor:
    view = y.view(-1)
    view.masked_fill_(view > 0, -1.0)
    return y


@pytest.mark.parametrize("make", [write_slice, write_column, add_in_place, relu_in_place, masked_fill_in_place])
def test_a_write_into_a_tensor_is_kept_or_refused(make: Any) -> None:
    model = made(lambda: Returns(make))
    refused = ""
    try:
        program = trace(model, (random(2, 4),))
    except SparsecError as error:
        refused = str(error)
    if refused:
        assert "aten." in refused
        return
    assert_equal(model, program, random(3, 4, seed=1))


def test_an_operator_off_the_list_is_refused_by_name() -> None:
    model = made(lambda: Returns(lambda y, x: torch.special.bessel_j0(y)))

    with pytest.raises(SparsecError, match=r"aten\.special_bessel_j0\.default is not on sparsec's allow-list"):
        trace(model, (random(2, 4),))


# Roles ----------------------------------------------------------------------------------------------------------------


def roles(program: Program) -> dict[str, str]:
    return {site.name.removesuffix(".weight"): site.role for site in program.sites}


def test_roles_of_an_encoder_come_from_its_graph() -> None:
    program = trace(made(Encoder), (tokens(2, 3),))

    assert {
        "query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "attention.output",
        "up": "ffn.up", "down": "ffn.down", "pooler": "pooler",
    } == roles(program)  # fmt: skip
    assert "--include-pooler" in (program.sites["pooler.weight"].excluded or "")


def test_roles_of_a_gated_feed_forward_come_from_its_graph() -> None:
    assert {"gate": "ffn.gate", "up": "ffn.up", "down": "ffn.down"} == roles(trace(made(Gated), (random(2, 4),)))


def test_a_last_layer_is_a_head_and_excluded_with_its_reason() -> None:
    program = trace(made(Classifier), (random(2, 5),))

    assert {"body": "ffn.up", "head": "head"} == roles(program)
    assert program.sites["body.weight"].excluded is None
    assert "role head" in (program.sites["head.weight"].excluded or "")


def test_a_model_of_one_layer_has_no_head() -> None:
    assert {"fc": "linear"} == roles(trace(made(lambda: Returns(lambda y, x: y)), (random(2, 4),)))


def test_names_say_nothing_about_roles() -> None:
    class Misnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lm_head = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.lm_head(functional.gelu(self.embedding(x)))

    program = trace(made(Misnamed), (random(2, 4),))

    assert {"embedding": "ffn.up", "lm_head": "ffn.down"} == roles(program)
    assert all(site.eligible for site in program.sites)


def test_every_parameter_is_a_site_or_excluded_with_a_reason() -> None:
    model = made(Encoder)
    program = trace(model, (tokens(2, 3),))
    reasons = {entry.name: (entry.role, entry.reason) for entry in program.sites.exclusions}

    assert dict(model.named_parameters()).keys() == reasons.keys() | {site.name for site in program.sites}
    assert ("embedding", "norm", "bias") == (
        reasons["words.weight"][0],
        reasons["norm.weight"][0],
        reasons["up.bias"][0],
    )
    assert all(reason for _, reason in reasons.values())


def test_a_weight_that_addmm_reads_is_a_site_seen_the_other_way_round() -> None:
    program = trace(made(Transposed), (random(2, 4),))

    (site,) = program.sites
    assert ("conv1d_hf", (1, 6, 4)) == (site.kind, site.shape)
    assert torch.equal(program.module.get_parameter("weight").T, site.read(program.module)[0])


def test_an_embedding_tied_to_a_head_stays_dense_unless_asked_for() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.fc(self.words(tokens)))

    program = trace(made(Language), (tokens(2, 3),))

    assert {"fc.weight": True, "words.weight": False} == {site.name: site.eligible for site in program.sites}
    assert "tied embedding" == program.sites["words.weight"].role
    asked = program.sites.with_targets({"words.weight": "2:4"})
    assert "2:4" == str(asked["words.weight"].pattern)
    assert_equal(made(Language), program, tokens(1, 3))


# Transformers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    import transformers

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(verbosity)


def test_bert_keeps_its_names_and_outputs() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    model = made(lambda: BertModel(config)).train()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": tokens(2, 5), "attention_mask": mask}
    program = trace(model, inputs, {name: {0: "batch", 1: "length"} for name in inputs}, {"length": 16})

    assert model.training
    assert ["last_hidden_state", "pooler_output"] == list(program(**inputs))
    for batch, length in [(1, 1), (3, 16)]:
        assert_equal(model, program, input_ids=tokens(batch, length), attention_mask=torch.ones(batch, length).long())
    assert_equal(model, program, **inputs)
    found = roles(program)
    assert 13 == len(found)
    layer = "encoder.layer.1"
    assert {
        f"{layer}.attention.self.query": "attention.query", f"{layer}.attention.self.key": "attention.key",
        f"{layer}.attention.self.value": "attention.value", f"{layer}.attention.output.dense": "attention.output",
        f"{layer}.intermediate.dense": "ffn.up", f"{layer}.output.dense": "ffn.down", "pooler.dense": "pooler",
    }.items() <= found.items()  # fmt: skip
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in program.module.named_parameters())


def test_a_llama_decoder_is_traced_with_its_roles() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    model = made(lambda: LlamaForCausalLM(config))
    program = trace(model, {"input_ids": tokens(2, 5)}, {"input_ids": {0: "batch", 1: "length"}}, {"length": 16})

    assert ["logits"] == list(program(tokens(2, 5)))
    for batch, length in [(1, 1), (2, 5), (3, 16)]:
        assert_equal(model, program, input_ids=tokens(batch, length))
    layer = "model.layers.0"
    assert {
        f"{layer}.self_attn.q_proj": "attention.query", f"{layer}.self_attn.k_proj": "attention.key",
        f"{layer}.self_attn.v_proj": "attention.value", f"{layer}.self_attn.o_proj": "attention.output",
        f"{layer}.mlp.gate_proj": "ffn.gate", f"{layer}.mlp.up_proj": "ffn.up", f"{layer}.mlp.down_proj": "ffn.down",
        "lm_head": "head",
    } == roles(program)  # fmt: skip


def test_a_vision_transformer_is_traced() -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
    )  # fmt: skip
    model = made(lambda: ViTModel(config))
    program = trace(model, {"pixel_values": random(2, 3, 8, 8)})

    for batch in (1, 4):
        assert_equal(model, program, pixel_values=random(batch, 3, 8, 8, seed=1))
    assert {"attention.query", "attention.output", "ffn.up", "ffn.down", "pooler"} <= set(roles(program).values())


def test_gpt2_is_traced_and_its_transposed_weights_are_sites() -> None:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=10, n_positions=16, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    model = made(lambda: GPT2Model(config))
    program = trace(model, {"input_ids": tokens(2, 5)}, {"input_ids": {0: "batch", 1: "length"}}, {"length": 16})

    assert_equal(model, program, input_ids=tokens(1, 7))
    assert {"conv1d_hf": 4} == dict(Counter(site.kind for site in program.sites))
    assert (1, 24, 8) == program.sites["h.0.attn.c_attn.weight"].shape


def test_a_mask_of_minus_infinity_gives_what_the_model_gives() -> None:
    class Blocked(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return torch.softmax(x.masked_fill(~keep, -math.inf), -1)

    keep = torch.tensor([[True, False, True], [False, False, True]])
    program = trace(Blocked(), (random(2, 3), keep))

    assert_equal(Blocked(), program, random(2, 3, seed=1), keep)


def test_a_batch_norm_that_is_called_twice_is_traced() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.norm(x)))

    assert_equal(made(Twice), trace(made(Twice), (random(2, 4, 5),)), random(3, 4, 5))
