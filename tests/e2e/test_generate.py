"""Generation with an artifact's kernels: the model's own `generate`, cache and pipelines; tiny and real weights."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import NOT_TRACEABLE, ZOO

import sparsec
from sparsec.errors import UsageError
from sparsec.pipeline import relative_difference

PATTERN, QUICK = "16:2:5", sparsec.Options(measure_speed=False)
SAME = 1e-6  # of the largest output: fp32 sums of at most 99 products, in another order
DATA = Path(os.environ.get("SPARSEC_DATA", Path(__file__).parents[3] / "shared" / "data"))
BABYLLAMA = DATA / "model_babyllama105"
TEXT = [name for name in ZOO if name not in NOT_TRACEABLE]
Compiled = Callable[[str], sparsec.Artifact]
FAST = ("bert", "gpt2", "llama", "t5")  # encoder, Conv1D, decoder, both


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], sparsec.Artifact]:
    """The artifact of an architecture, made once."""

    @functools.cache
    def compiled(name: str) -> sparsec.Artifact:
        case, folder = ZOO[name](), tmp_path_factory.mktemp(name)
        saved = sparsec.trace(case.model, case.inputs, case.dynamic, case.limits).save(folder / "program")
        return sparsec.compile(str(saved), pattern=PATTERN, out=folder / "x.sparsec", options=QUICK)

    return compiled


def write_sparse_weights(model: nn.Module, artifact: sparsec.Artifact) -> None:
    """The masked dense model: the artifact's weights, unpacked, in the model's own layers."""
    held = artifact.load_dense().graph.state_dict()
    views = {site["name"]: site["view"]["axes"] for site in artifact.manifest["sites"]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dense = held.get(f"{name}_dense")
            in_out = dense is not None and views[name] == [1, 0]
            parameter.copy_(held[name] if dense is None else dense.T if in_out else dense)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in TEXT])
def test_an_architecture_gives_the_artifacts_outputs_and_is_restored(name: str, compiled: Compiled) -> None:
    case = ZOO[name]()
    if "input_ids" not in case.inputs:
        pytest.skip(f"{name} reads no text")
    artifact = compiled(name)
    kernels = {s["name"] for s in artifact.manifest["sites"] if s["verdicts"].get("kernel", {}).get("sparse")}
    before = list(objects(case.model))

    attached = sparsec.attach(case.model, artifact.root)

    assert kernels <= {*attached.layers, *(attached.dense if name == "siglip" else ())}  # torch's attention reads it
    inputs = case.other_inputs()
    with torch.no_grad():
        expected, found = artifact.load()(**inputs), case.model(**inputs)
    for output, value in expected.items():
        assert relative_difference(found[output], value) <= SAME, output
    sparsec.detach(case.model)
    assert before == list(objects(case.model))


def objects(model: nn.Module) -> Iterator[tuple[str, int, Any]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, id(tensor), tensor.detach().numpy().tobytes()
    for name, module in model.named_modules():
        yield name, id(module), module.training


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generate_gives_the_masked_models_tokens_with_the_cache(name: str, compiled: Compiled) -> None:
    case, masked, artifact = ZOO[name](), ZOO[name]().model, compiled(name)
    write_sparse_weights(masked, artifact)
    sparsec.attach(case.model, artifact.root)
    prompt = {key: case.inputs[key] for key in ("input_ids", "attention_mask")}
    prompt["attention_mask"] = torch.ones_like(prompt["attention_mask"])

    for options in ({}, {"num_beams": 2}):
        found, expected = (greedy(model, prompt, 12, **options) for model in (case.model, masked))
        assert torch.equal(expected, found)


def greedy(model: Any, prompt: dict[str, Tensor], tokens: int, **options: Any) -> Tensor:
    made: Tensor = model.generate(
        **prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, **options
    )
    return made


def test_a_text_pipeline_runs_unchanged(compiled: Compiled) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    case, masked = ZOO["llama"](), ZOO["llama"]().model
    words = {f"w{i}": i for i in range(case.model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0")
    artifact = compiled("llama")
    write_sparse_weights(masked, artifact)
    sparsec.attach(case.model, artifact.root)

    texts = [
        transformers.pipeline("text-generation", model=model, tokenizer=fast, device="cpu")(
            "w5 w17 w40", max_new_tokens=8, do_sample=False
        )
        for model in (case.model, masked)
    ]

    assert texts[0] == texts[1]
    assert len(texts[0][0]["generated_text"].split()) > 3


def test_saving_an_attached_model_writes_no_weights(compiled: Compiled, tmp_path: Path) -> None:
    case = ZOO["llama"]()
    sparsec.attach(case.model, compiled("llama").root)

    with pytest.raises(UsageError, match="no state dict"):
        case.model.save_pretrained(tmp_path / "saved")

    assert not list(tmp_path.glob("saved/*.safetensors")) + list(tmp_path.glob("saved/*.bin"))
    sparsec.detach(case.model)
    case.model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@pytest.mark.skipif(not (BABYLLAMA / "hf").is_dir(), reason=f"no {BABYLLAMA}: set SPARSEC_DATA to the data folder")
@pytest.mark.parametrize("pattern", ["64:2:5", *(pytest.param(p, marks=pytest.mark.slow) for p in ("2:4", "64:2:8"))])
def test_a_real_model_writes_the_masked_models_story(pattern: str, tmp_path: Path) -> None:
    import transformers

    folder = str(BABYLLAMA / "hf")
    artifact = sparsec.compile(folder, pattern=pattern, out=tmp_path / "x.sparsec", options=QUICK)
    model, masked = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    write_sparse_weights(masked, artifact)
    attached = sparsec.attach(model, artifact.root)
    lines = (BABYLLAMA / "validation.jsonl").read_text().splitlines()[:2]
    ids = torch.tensor([json.loads(line)["input_ids"][:20] for line in lines])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    found, expected = (greedy(one, prompt, 200) for one in (model, masked))

    assert 5 * 7 == len(attached.layers)
    assert (2, 220) == expected.shape
    assert torch.equal(expected, found)
