"""attach puts all of an artifact into its model, or refuses and changes nothing; detach puts everything back."""

from __future__ import annotations

import copy
import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core.axes_models import moved
from models import Classifier, Encoder, Residual, Tied, made, random
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import sparsec
from sparsec import Program, _fx
from sparsec.axes import analyse, apply
from sparsec.backends.kernel.cpu import int8, library
from sparsec.backends.kernel.cpu.int8 import int8_linear
from sparsec.backends.kernel.cpu.layer import INT8, SparseLinear
from sparsec.errors import ArtifactError, UsageError
from sparsec.layout import compress, decompress, stored_as
from sparsec.pipeline import relative_difference
from sparsec.view import WeightView

PATTERN = "4:2:5"  # tails in rows and columns of every net here
SAME = 1e-6  # of the largest output: a kernel that applies its activation itself rounds otherwise in the last bits
QUICK = sparsec.Options(measure_speed=False)


def compiled(net: nn.Module | Program, folder: Path, pattern: str = PATTERN) -> sparsec.Artifact:
    """The artifact of a net in eval mode, or of its program."""
    if isinstance(net, Program):
        return sparsec.compile(str(net.save(folder / "p")), pattern=pattern, out=folder / "x.sparsec", options=QUICK)
    return sparsec.compile(net, example(net), pattern=pattern, out=folder / "x.sparsec", options=QUICK)


def example(net: nn.Module) -> list[Tensor]:
    if isinstance(net, (Encoder, Stream)):
        return [torch.tensor([[1, 2, 3], [4, 5, 6]])]
    return [random(2, 3, 6 if isinstance(net, Tied) else 5)]


def state(net: nn.Module) -> dict[str, tuple[int, Any]]:
    """Everything that detach must restore: the very objects, and the bytes they hold."""
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    held: dict[str, tuple[int, Any]] = {name: (id(value), value.detach().numpy().tobytes()) for name, value in tensors}
    return held | {f"{name} (module)": (id(module), module.training) for name, module in net.named_modules()}


def same(net: nn.Module, artifact: sparsec.Artifact) -> bool:
    """Whether the net gives the artifact's outputs, on inputs of another batch."""
    inputs = [torch.cat([x, x.flip(0)[:1]]) for x in example(net)]
    with torch.no_grad():
        expected, found = artifact.load()(*inputs), net(*inputs)
    found = found if isinstance(found, dict) else {"output": found}
    return all(relative_difference(found[name], value) <= SAME for name, value in expected.items())


@pytest.mark.parametrize("net", [Residual, Classifier, Tied, Encoder])
def test_an_attached_model_gives_the_artifacts_outputs_and_detach_restores_it(
    net: type[nn.Module], tmp_path: Path
) -> None:
    model = made(net)
    artifact, before = compiled(model, tmp_path), state(model)
    sites = [site["name"] for site in artifact.manifest["sites"] if site["pattern"]]

    attached = sparsec.attach(model, artifact.root)

    assert same(model, artifact)
    assert set(sites) <= set(attached.layers) and not attached.dense
    assert all(isinstance(model.get_submodule(name.removesuffix(".weight")), SparseLinear) for name in attached.layers)
    assert not any(value.requires_grad for value in model.parameters())
    sparsec.detach(model)
    assert before == state(model)


def test_norms_biases_and_embeddings_that_were_trained_are_loaded_too(tmp_path: Path) -> None:
    model = made(Encoder)
    program = sparsec.trace(model, example(model)).clone()
    for name, value in list(program.module.named_parameters()):
        if not program_site(program, name):
            _fx.set_tensor(program.module, name, nn.Parameter(value.detach() * 1.5 + 0.25))
    artifact, before = compiled(program, tmp_path), state(model)

    sparsec.attach(model, artifact.root)

    assert same(model, artifact)
    assert torch.equal(made(Encoder).norm.weight * 1.5 + 0.25, model.norm.weight)
    assert torch.equal(made(Encoder).words.weight * 1.5 + 0.25, model.words.weight)
    sparsec.detach(model)
    assert before == state(model)


def program_site(program: Program, name: str) -> bool:
    return name in {site.name for site in program.sites}


class Stream(nn.Module):
    """An embedding, two residual layers, a norm and a head: its width is a permutation variable."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(10, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens)
        hidden = hidden + self.down(functional.gelu(self.up(hidden)))
        return self.head(self.norm(hidden))


def test_a_permutation_of_the_residual_is_loaded_whole(tmp_path: Path) -> None:
    model = made(Stream)
    program = sparsec.trace(model, example(model))
    axes = analyse(program)
    residual = next(v for v in axes.variables if "words.weight:1" in moved(axes)[v.name])
    artifact = compiled(apply(program, residual, torch.tensor([[3, 5, 0, 2, 4, 1]]).view(residual.shape)), tmp_path)

    sparsec.attach(model, artifact.root)

    assert same(model, artifact)
    assert torch.equal(made(Stream).words.weight[:, [3, 5, 0, 2, 4, 1]], model.words.weight)
    assert torch.equal(made(Stream).norm.weight[[3, 5, 0, 2, 4, 1]], model.norm.weight)


def test_tied_layers_share_one_stream_and_keep_their_own_biases(tmp_path: Path) -> None:
    model = made(Tied)
    artifact = compiled(model, tmp_path)

    attached = sparsec.attach(model, artifact.root)

    assert ("first.weight", "second.weight") == attached.layers
    first, second = model.first, model.second
    assert first.stream is second.stream and not torch.equal(first.bias, second.bias)


def test_what_is_equal_is_shared_and_no_dense_weight_of_a_layer_is_held(tmp_path: Path) -> None:
    artifact, model = compiled(made(Residual), tmp_path), made(Residual)  # the traced one lives on in torch's caches
    bias, weight = model.up.bias, weakref.ref(model.up.weight)

    sparsec.attach(model, artifact.root, originals="drop")

    assert bias.data_ptr() == model.up.bias.data_ptr()
    assert weight() is None
    with pytest.raises(UsageError, match=r"dropped when .* was attached"):
        sparsec.detach(model)
    assert same(model, artifact)


class Wrapped(nn.Module):
    """One layer of the caller's choice, and what is done with it."""

    def __init__(self, layer: nn.Module, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer, self.run = layer, run or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.run(self.layer, x))


def test_a_square_conv1d_keeps_its_orientation(tmp_path: Path) -> None:
    model = made(lambda: Wrapped(Conv1D(5, 5)))
    nn.init.normal_(model.layer.bias)
    artifact = compiled(model, tmp_path)

    assert ("layer.weight",) == sparsec.attach(model, artifact.root).layers
    assert same(model, artifact)
    weight = artifact.load_dense().graph.get_buffer("layer.weight_dense")  # rows x cols, as F.linear takes it
    assert torch.equal(weight.T, model.layer.unpacked())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def with_hook() -> nn.Module:
    layer = nn.Linear(5, 5)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


DENSE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another forward": (lambda: Wrapped(Scaled(5, 5)), "Scaled computes more than a product"),
    "a hook": (lambda: Wrapped(with_hook()), "the Linear has forward hooks"),
    "read by its user": (
        lambda: Wrapped(nn.Linear(5, 5), lambda layer, x: functional.linear(x, layer.weight, layer.bias)),
        "the model's code reads the weight itself",
    ),
    "the model itself": (lambda: nn.Linear(5, 5), "it is the model itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
def test_what_is_no_plain_product_runs_dense_on_the_sparse_weight_and_says_why(case: str, tmp_path: Path) -> None:
    make, reason = DENSE[case]
    model = made(make)
    artifact = sparsec.compile(
        model, example(model), targets={"re:.*": PATTERN}, out=tmp_path / "x.sparsec", options=QUICK
    )
    before = state(model)

    attached = sparsec.attach(model, artifact.root)

    assert ((), [reason]) == (attached.layers, [text.split(",")[0] for text in attached.dense.values()])
    x = example(model)[0]
    with torch.no_grad():
        torch.testing.assert_close(artifact.load()(x)["output"], model(x), rtol=0, atol=1e-6)
    sparsec.detach(model)
    assert before == state(model)


def test_a_weight_without_a_kernel_is_unpacked_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Residual)
    stored_small = compiled(model, tmp_path, "unstructured:0.5")
    assert "no kernel makes it faster" in sparsec.attach(model, stored_small.root).dense["up.weight"]
    assert same(model, stored_small)
    sparsec.detach(model)
    (tmp_path / "other").mkdir()
    artifact = compiled(model, tmp_path / "other")
    monkeypatch.setattr(library, "level", lambda: None)
    monkeypatch.setattr(library, "unavailable_reason", lambda: "no compiler")

    assert {"up.weight": "no compiler", "down.weight": "no compiler"} == sparsec.attach(model, artifact.root).dense
    assert same(model, artifact)


class Constant(nn.Module):
    """A tensor that is neither parameter nor buffer, and a constant in the code."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(5, 7), nn.Linear(7, 5), torch.full((5,), scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) * self.scale + torch.tensor([1.0])


def test_tensors_in_the_models_code_are_no_parameters(tmp_path: Path) -> None:
    model = made(Constant)
    artifact = compiled(model, tmp_path)
    assert ("up.weight", "down.weight") == sparsec.attach(model, artifact.root).layers
    assert same(model, artifact)

    with pytest.raises(UsageError, match="its outputs are not the stored ones"):
        sparsec.attach(made(lambda: Constant(3.0)), artifact.root)


class Narrow(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)


class Relu(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Extra(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(5))


class TwoInputs(Residual):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x) + y


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another model": (
        Tied,
        r"does not belong to this Tied: the artifact holds down\.bias, which the model lacks; .*Resid",
    ),
    "another shape": (Narrow, r"down\.weight has shape \(5, 8\) in the artifact and \(5, 7\) in the model"),
    "a parameter too many": (Extra, "computes with extra, which the artifact lacks"),
    "another function": (Relu, "its outputs are not the stored ones"),
    "other inputs": (TwoInputs, r"fails on the stored inputs \(TypeError: .*'y'"),
    "another dtype": (
        lambda: Residual().bfloat16(),
        "float32 in .* and torch.bfloat16 in the model; load the model with",
    ),
    "another device": (lambda: Residual().to("meta"), "up.weight is on meta, the kernels run on the CPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_not_the_artifacts_is_refused_and_left_as_it_was(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    artifact, model = compiled(made(Residual), tmp_path), made(make)
    before = [(name, id(value)) for name, value in [*model.named_parameters(), *model.named_modules()]]

    with pytest.raises(UsageError, match=message) as raised:
        sparsec.attach(model, artifact.root)

    assert "\n" not in str(raised.value)
    assert before == [(name, id(value)) for name, value in [*model.named_parameters(), *model.named_modules()]]
    with pytest.raises(UsageError, match="has no artifact attached"):
        sparsec.detach(model)


def test_attaching_twice_in_train_mode_or_with_an_unknown_word_is_refused(tmp_path: Path) -> None:
    model = made(Residual)
    artifact = compiled(model, tmp_path)
    sparsec.attach(model, artifact.root)
    with pytest.raises(UsageError, match=r"x\.sparsec is attached to this model already"):
        sparsec.attach(model, artifact.root)
    sparsec.detach(model)

    with pytest.raises(UsageError, match="originals='move' is not known; expected keep or drop"):
        sparsec.attach(model, artifact.root, originals="move")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="train mode"):
        sparsec.attach(model.train(), artifact.root)


def test_an_artifact_that_is_damaged_or_has_no_kernels_is_refused(tmp_path: Path) -> None:
    model = made(Residual)
    artifact = compiled(model, tmp_path)
    data = bytearray((artifact.root / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    broken = Path(shutil.copytree(artifact.root, tmp_path / "broken.sparsec"))
    (broken / "weights.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors was changed"):
        sparsec.attach(model, broken)

    text = json.loads((artifact.root / "manifest.json").read_text())
    text["backends"] = {"onnx": {}}
    from sparsec import store

    store.seal(artifact.root, "sparsec-artifact", {key: value for key, value in text.items() if key != "files"})
    with pytest.raises(UsageError, match="holds onnx, not kernel"):
        sparsec.attach(model, artifact.root)


@pytest.fixture
def attached(tmp_path: Path) -> Residual:
    model = made(Residual)
    sparsec.attach(model, compiled(model, tmp_path).root)
    return model


def test_an_attached_model_refuses_to_train_save_load_cast_and_move(attached: Residual) -> None:
    x = random(2, 5)
    for act, message in (
        (lambda: attached.train()(x), "for inference: call model.eval"),
        (lambda: attached.eval()(x.requires_grad_()), "no backward"),
        (attached.state_dict, "no state dict, its weights are packed"),
        (lambda: attached.load_state_dict(Residual().state_dict()), "takes no weights"),
        (lambda: attached.half(), "float16 on cpu was asked for"),
        (lambda: attached.to("meta"), "float32 on meta was asked for"),
    ):
        with pytest.raises((UsageError, RuntimeError), match=message):
            act()
    with torch.no_grad():
        assert attached.to("cpu").float()(x).shape == x.shape


def test_an_attached_model_may_be_copied_and_pickled(attached: Residual) -> None:
    buffer, x = io.BytesIO(), random(2, 5)
    torch.save(attached, buffer)
    buffer.seek(0)
    expected = attached(x)
    original = made(Residual)

    for copied in (copy.deepcopy(attached), torch.load(buffer, weights_only=False)):
        assert torch.equal(expected, copied(x))
        sparsec.detach(copied)
        assert torch.equal(original(x), copied(x))
    assert torch.equal(expected, attached(x))


def test_a_layer_of_int8_values_runs_the_int8_kernels() -> None:
    pattern, weight, x = sparsec.Pattern.parse(PATTERN), random(8, 10), random(3, 10, seed=1)
    layout = stored_as(compress(weight[None], pattern, pattern.project(weight.abs()[None])), "int8")
    layer = SparseLinear(INT8, int8.pack(layout), WeightView((1, 0), (10, 8)), nn.Parameter(random(8), False))

    assert torch.equal(int8_linear(x, int8.pack(layout), layer.bias, 8), layer(x))
    assert torch.equal(decompress(layout)[0].T, layer.unpacked())


def test_torch_compile_takes_an_attached_model_as_one_graph(attached: Residual) -> None:
    compiled, x = torch.compile(attached, backend="eager", fullgraph=True), random(2, 5)

    with torch.no_grad():
        assert torch.equal(attached(x), compiled(x))


def test_the_stand_in_for_a_weight_answers_as_the_weight_would(attached: Residual) -> None:
    layer: Any = attached.up
    weight = layer.weight

    assert (torch.float32, torch.device("cpu"), torch.Size([8, 5])) == (weight.dtype, weight.device, weight.shape)
    assert 0 == layer.reads
    dense, x = layer.unpacked(), random(3, 5)
    for found in (functional.linear(x, weight), x @ weight.T, (weight @ x.T).T, torch.matmul(x, weight.t())):
        assert torch.equal(x @ dense.T, found) or torch.allclose(x @ dense.T, found, atol=1e-6)
    assert torch.equal(dense[1:3], weight[1:3])
    assert 5 == layer.reads
    assert "SparseLinear(in_features=5, out_features=8, bias=True)" == repr(layer)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(0),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.zeros(1)),
    ],
)
def test_writing_a_packed_weight_is_refused_because_it_would_be_lost(attached: Residual, write: Any) -> None:
    with pytest.raises(UsageError, match="its weight cannot be written"):
        write(attached.up)
