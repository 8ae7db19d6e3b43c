"""What a merge holds in memory is predicted from headers, and a budget of it is kept or refused; results do not depend on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adarank
import text_zoo
from adarank.adapt.factor_files import FactorFiles
from adarank.alignment.align import align
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.cli.main import main
from adarank.errors import RecipeError
from adarank.io.checkpoint import MemorySource
from adarank.io.writer import write_checkpoint
from adarank.method import Outline
from adarank.methods import METHODS
from adarank.recipe.plan import check_memory, peak_bytes
from adarank.recipe.registry import METHODS as ALL
from adarank.recipe.sizes import shard_bytes, size_text
from adarank.settings import parse
from adarank.spectral.blocks import build_blocks

MB = 10**6


def network(
    shapes: dict[str, tuple[int, ...]], tasks: int = 2, dtype: torch.dtype = torch.float32
) -> AlignedCheckpoints:
    """Tensors of these shapes that take no memory."""
    sources = [
        MemorySource({n: torch.zeros(1, dtype=dtype).expand(s) for n, s in shapes.items()}, f"model {number}")
        for number in range(tasks + 1)
    ]
    return align(sources[0], {f"task{number}": source for number, source in enumerate(sources[1:])})


def outline(net: AlignedCheckpoints, memory: int | None = None) -> Outline:
    return Outline(net, {n: (info.shape, info.dtype) for n, info in net.tensors.items()}, memory=memory)


def adaptive(**settings: Any) -> Any:
    return parse(ALL.named("adarank", ""), settings, "adarank")


def test_elementwise_merges_need_blocks_whatever_the_tensors() -> None:
    method = METHODS["task_arithmetic"]()
    few, many = (outline(network({"a.weight": (rows, 2**12)})) for rows in (2**8, 2**12))
    assert method.held_bytes(few) == method.held_bytes(many) == 4 * 2 * 2**18
    half = outline(network({"a.weight": (2**8, 2**12)}, dtype=torch.bfloat16))
    assert method.held_bytes(half) == 4 * 4 * 2**18  # and the origin and a model's tensor, which are no float32 files


def test_blocks_are_as_small_as_a_budget_needs() -> None:
    method, net = METHODS["ties_merging"](), network({"a.weight": (2**10, 2**12)})
    roomy, narrow, least = (outline(net, memory) for memory in (100 * MB, 4 * MB, 1))
    assert method.held_bytes(roomy) == method.held_bytes(outline(net))
    assert 3 * MB < method.held_bytes(narrow) <= 4 * MB
    assert 1 < method.held_bytes(least) < MB  # smaller ones would spare nothing


def test_whole_tensors_count_as_often_as_they_are_copied() -> None:
    method, net = METHODS["cart"](rank=0.5), network({"a.weight": (64, 32), "b.weight": (16, 16)})
    assert method.held_bytes(outline(net)) == 4 * 15 * 64 * 32


def test_adaptation_holds_weights_origins_gradients_and_factors() -> None:
    net = network({"w.weight": (6, 4), "w.bias": (6,)})
    numbers = {
        "live": 30, "origin": 30, "of components": 10 * 2 * 4, "one decomposition, more than gradients and products": 14 * 24,
        "factors": 2 * 4 * (6 + 4), "task vectors of what is scaled": 2 * 6,
    }  # fmt: skip
    assert adaptive(origin="average").held_bytes(outline(net)) == 4 * sum(numbers.values())
    mapped = adaptive(origin="pretrained", rank=1.0)  # the base's own tensors are the origin
    assert mapped.held_bytes(outline(net)) == 4 * (sum(numbers.values()) - numbers["origin"])
    wholes = adaptive(origin="average", rank=1.0, mask="binary")  # whole task vectors, less what is pruned
    assert wholes.held_bytes(outline(net)) == 4 * (sum(numbers.values()) + 2 * 24)
    halves = adaptive(origin="average", precision="bfloat16")
    assert halves.held_bytes(outline(net)) == 4 * (sum(numbers.values()) + numbers["factors"] // 2)


def test_factors_lie_in_files_where_a_budget_has_no_room() -> None:
    net, method = network({f"{layer}.weight": (1024, 1024) for layer in range(9)}), adaptive(origin="average")
    whole = method.held_bytes(outline(net))
    factors = 4 * 9 * 2 * 1024 * 2048
    for memory, in_files in ((None, False), (whole, False), (whole - 1, True)):
        assert method.factors_in_files(outline(net, memory)) == in_files
    assert method.held_bytes(outline(net, whole - 1)) == whole - factors * 8 // 9  # one matrix at a time is made
    by_block = method.smaller(outline(net))["adapt: {by: block}"]
    assert by_block < whole


def lies_in(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether a tensor's numbers are those of a file in a folder, mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.split(maxsplit=5)[-1].startswith(str(folder))
    return False


def test_factors_from_files_are_those_that_were_made(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"large.weight": (520, 516), "small.weight": (4, 3), "bias": (9,)}
    states = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)]
    base, one, two = (MemorySource(state, "model") for state in states)
    net = align(base, {"one": one, "two": two})
    made, mapped, again = (
        build_blocks(net, "average", kept=kept)
        for kept in (None, FactorFiles(tmp_path, True), FactorFiles(tmp_path, True))
    )
    assert len(list(tmp_path.iterdir())) == 1  # of the large one
    if Path("/proc/self/maps").exists():
        assert all(lies_in(getattr(mapped["large.weight"], part), tmp_path) for part in ("origin", "u", "s", "v"))
        assert not lies_in(made["large.weight"].u, tmp_path)
    for name, blocks in made.items():
        lam, mask = torch.tensor([0.3, 0.7]), torch.rand(blocks.components, generator=generator)
        gradient = torch.randn(shapes[name], generator=generator)
        for other in (mapped[name], again[name]):
            assert torch.equal(other.compose(lam, mask), blocks.compose(lam, mask))
            assert torch.equal(other.compose(lam, mask > 0.2), blocks.compose(lam, mask > 0.2))
            wanted, given = (each.gradient(gradient, lam, mask, True) for each in (blocks, other))
            assert torch.equal(given.lam, wanted.lam)
            assert torch.equal(given.mask, wanted.mask)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("zoo"))


def test_networks_count_where_they_run(zoo: Path) -> None:
    jobs = [adarank.open_job(adarank.load_recipe(text_zoo.recipe(zoo, merge_method=m))) for m in ("average", "regmean")]
    assert jobs[1].process_bytes > jobs[0].process_bytes
    assert all(peak_bytes(job) > job.process_bytes for job in jobs)


def written(folder: Path, *options: str) -> int:
    return main(["merge", str(folder / "recipe.yaml"), str(folder / "out"), "--no-report", *options])


def models(folder: Path) -> None:
    """Two models with one tensor of a few blocks, and a recipe."""
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        tensor = torch.randn(300, 1000, generator=generator)
        (folder / name).mkdir()
        write_checkpoint(folder / name, {"w.weight": ((300, 1000), torch.float32)}, iter([("w.weight", tensor)]))
    (folder / "recipe.yaml").write_text(
        json.dumps({"merge_method": "linear", "models": [{"model": "one"}, {"model": "two"}]})
    )


def test_a_budget_changes_no_byte(tmp_path: Path) -> None:
    models(tmp_path)
    outputs = []
    for options in ((), ("--memory", "201MB"), ("--memory", "4GiB")):
        assert written(tmp_path, "--force", *options) == 0
        outputs.append((tmp_path / "out" / "model.safetensors").read_bytes())
        plan = json.loads((tmp_path / "out" / "adarank.json").read_text())["plan"]
        assert plan["memory"] == (shard_bytes(options[1]) if options else None)
        assert plan["memory"] is None or plan["peak_bytes"] <= plan["memory"]
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_budget_that_cannot_be_kept_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models(tmp_path)
    for command in (
        ["plan", str(tmp_path / "recipe.yaml")],
        ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")],
    ):
        assert main([*command, "--memory", "50MB"]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "are needed and 50.0MB were given" in said
        assert "'linear' holds 3 float32 copies of a block" in said
    assert not (tmp_path / "out").exists()
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--memory", "much"]) == 1
    assert "--memory: a size is a number of bytes" in capsys.readouterr().err


def test_a_refusal_names_what_would_fit(zoo: Path) -> None:
    from dataclasses import replace

    path = text_zoo.recipe(zoo, merge_method="adarank", parameters={"rank": 0.25, "lambda": 1.0}, adapt={"steps": 2})
    job = replace(adarank.open_job(adarank.load_recipe(path)), memory=200 * MB)
    with pytest.raises(
        RecipeError, match=r"are needed and 200MB were given.*Give that much or adapt: {by: block} \(\d+MB\)"
    ):
        check_memory(job)
    check_memory(replace(job, memory=peak_bytes(replace(job, memory=None))))
    with pytest.raises(RecipeError, match=r"budget of the processor's memory, and device is cuda"):
        check_memory(replace(job, recipe=job.recipe.model_copy(update={"device": "cuda"})))


def test_sizes_are_said_so_that_they_suffice() -> None:
    for count in (1, 999_999, 10**6, 123_456_789, 999_999_999, 10**9, 1_234_567_890, 98_765_432_100):
        text = size_text(count)
        assert count <= shard_bytes(text) <= max(count * 1.02, 10**4 + count), text
