"""What it would send to gather a network's blocks as they run, and what each of several adapting processes would hold then.

    python benchmarks/gathering.py [--width 128] [--records FILE]

Adaptation by model does not gather blocks: this counts, in one process, what it would. A BERT's weights are put aside, each block gets
its own when it runs under a non-reentrant checkpoint and lets go of them after, and gradients are put aside as they come. Counted are
the bytes that go to and fro in a pass; gradients are compared with those of the whole network. Nothing is sent, and no peak is measured.
The table carries the counts on to eight tasks at full rank, with each process's share of merged weights, gradients, origins and factors.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, Records
from scale import TASKS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adarank.io.record import machine, versions
from adarank.models.hollow import release

LAYERS, TOKENS, VOCABULARY = 4, 16, 64
RANKS = (1, 2, 4, 8, 32, 128)


def network(width: int) -> tuple[nn.Module, nn.ModuleList]:
    """A BERT of seeded random weights, and its blocks."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=width // 64, intermediate_size=4 * width,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    module = transformers.BertForSequenceClassification(config).eval()
    return module, module.bert.encoder.layer


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gather_when_run(block: nn.Module, weights: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], sent: Counter[str]) -> None:  # fmt: skip
    """Have a block's weights in memory while it runs, forwards and again in backward, and put its gradients aside."""
    parameters, plain = list(block.parameters()), block.forward

    def gathered(*arguments: Any, **named: Any) -> Any:
        for parameter in parameters:
            parameter.data = weights[parameter].clone()
        sent["weights"] += size(parameters)
        try:
            return plain(*arguments, **named)
        finally:
            release(parameters)

    def put_aside(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients[parameter], parameter.grad = parameter.grad, None
        sent["gradients"] += size([parameter])

    for parameter in parameters:
        weights[parameter] = parameter.data
        parameter.register_post_accumulate_grad_hook(put_aside)
    block.forward = lambda *arguments, **named: checkpoint(gathered, *arguments, use_reentrant=False, **named)
    release(parameters)


def counted(width: int) -> dict[str, float]:
    """Bytes of a network, and those that a forward and backward pass would send."""
    module, blocks = network(width)
    batch = torch.randint(0, VOCABULARY, (4, TOKENS))
    module(batch).logits.square().sum().backward()
    expected = {parameter: parameter.grad.clone() for parameter in blocks.parameters() if parameter.grad is not None}
    module.zero_grad()
    in_blocks, sent = size(blocks.parameters()), Counter[str]()
    weights: dict[Tensor, Tensor] = {}
    gradients: dict[Tensor, Tensor] = {}
    for block in blocks:
        gather_when_run(block, weights, gradients, sent)
    module(batch).logits.square().sum().backward()
    if gradients.keys() != expected.keys():
        raise SystemExit("gathered blocks have gradients of other weights than the whole network")
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    off = max(float((gradients[parameter] - gradient).abs().max()) for parameter, gradient in expected.items())
    return {
        "in_blocks": in_blocks, "outside": size(module.parameters()) - in_blocks, "largest_block": max(size(b.parameters()) for b in blocks),
        "weights_a_pass": sent["weights"] / in_blocks, "gradients_a_pass": sent["gradients"] / in_blocks, "gradients_off": off / largest,
    }  # fmt: skip


def table(times: float) -> list[str]:
    """Beside the number of processes, in bytes of the float32 weights in blocks: held now and the network's share of it, held if gathered
    (beside one block with its gradients, and what is in none), sent in a step now and if gathered.

    Arguments:
        times: how often a pass sends each weight or its gradient.
    """
    lines = []
    for ranks in RANKS:
        share, passes = (1 + 2 * TASKS) / ranks, -(-TASKS // ranks)  # origins and factors; passes one after another
        network_share, others = 2 / (2 + share), (ranks - 1) / ranks
        lines.append(f"| {ranks} | {2 + share:.2f} | {network_share:.0%} | {2 / ranks + share:.2f} | {2 * others:.2f} | {times * passes * others:.2f} |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--note", default="", help="kept in the record, such as what else the machine did")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    options = parser.parse_args()
    counts = counted(options.width)
    Records(options.records).write(
        {
            "kind": "cost", "name": "gathering", "what": "bytes that gathering a network's blocks would send in a pass, in bytes of their weights, counted in one process",
            "command": f"python benchmarks/gathering.py --width {options.width}", "layers": LAYERS, "counts": counts,
            "note": options.note, "seed": 0, "versions": versions(), "machine": machine(),
        }
    )  # fmt: skip
    print(counts)
    print("\n".join(table(counts["weights_a_pass"] + counts["gradients_a_pass"])))


if __name__ == "__main__":
    main()
