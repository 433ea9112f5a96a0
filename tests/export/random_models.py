"""Random models that can fail a proof.

A random tied GPT-2 repeats one token and agrees with a model whose blocks are all zero. Here what a
block writes outweighs what the embedding wrote, and no activation adds the same vector to every
token, so that greedy tokens keep changing; yet rounding errors do not grow from layer to layer.
"""

import torch

from gptopt.config import ModelConfig
from gptopt.export.contract import Contract
from gptopt.export.pipeline import Build
from gptopt.export.targets import GROWING
from gptopt.export.trace import PREFIX, trace
from gptopt.model import GPT

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 136, "vocab_size": 2048}
GAINS = {"qkv": 2.0, "proj": 1.0, "up": 3.0, "gate": 3.0, "down": 3.0}


@torch.no_grad()
def spread(model, seed=0):
    """Draw the weights of a module anew, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        layer = name.removesuffix(".weight").rpartition(".")[2]
        if parameter.dim() == 1:
            parameter.copy_(0.1 * values + (0.0 if name.endswith("bias") else 1.0))
        elif layer == "wte":
            parameter.copy_(0.5 * values)
        elif layer == "wpe":
            parameter.copy_(values)
        else:
            if layer == "down":
                values -= values.mean(dim=1, keepdim=True)
            parameter.copy_(GAINS.get(layer, 3.0) * parameter.shape[1] ** -0.5 * values)
    return model.eval()


def random_gpt(seed=0, **options):
    """A small random GPT, untied unless asked for."""
    config = ModelConfig(**{**SIZES, "tie_head": False, **options})
    return spread(GPT(config, kernels="reference"), seed)


_PROGRAMS = []


def build_of(model, target=GROWING):
    """The build of a model, which is recorded once however many tests draw one like it."""
    weights = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    for kind, config, program in _PROGRAMS:
        held = program.state_dict
        if (kind, config, held.keys()) == (type(model), model.config, weights.keys()) and all(
            torch.equal(held[name], tensor) for name, tensor in weights.items()
        ):
            return Build(target, program=program)
    build = Build(target, program=trace(model, Contract.of(model.config)))
    _PROGRAMS.append((type(model), model.config, build.program))
    return build
