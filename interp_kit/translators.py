"""The translators of a tuned lens, and the files that hold them.

One affine map h -> h + A h + b for the embedding and each block but the last, which takes the
residual stream there to the basis of the last block. Zero A and b are the logit lens. The files are
those of the public tuned-lens package, but for its pickle.

Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens",
arXiv:2303.08112.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.files import read_json, replacing
from interp_kit.specs import InputError, Spec, checked

CONFIG, PARAMETERS = "config.json", "params.safetensors"
Stream = Float[Tensor, "layer *place d_model"]


class LensConfig(Spec):
    """``config.json`` of the public tuned-lens package."""

    model_config = ConfigDict(extra="ignore")

    base_model_name_or_path: str
    d_model: int
    num_hidden_layers: int = Field(ge=1)
    bias: Literal[True] = True
    base_model_revision: str | None = None
    unembed_hash: str | None = None
    lens_type: Literal["linear_tuned_lens"] = "linear_tuned_lens"


@dataclass(frozen=True, kw_only=True)
class TunedLens:
    """The translators h -> h + ``weight[i]`` h + ``bias[i]``; i = l + 1 reads layer l.

    float32, on the CPU. ``config`` says which model they are for.
    """

    weight: Float[Tensor, "translator out d_model"]
    bias: Float[Tensor, "translator d_model"]
    config: LensConfig

    @classmethod
    def identity(
        cls, bridge: TransformerBridge, *, model: str = "", revision: str | None = None
    ) -> "TunedLens":
        """Translators that change nothing: the logit lens. ``model`` is the name to be kept."""
        n, d = bridge.cfg.n_layers, bridge.cfg.d_model
        config = LensConfig(
            base_model_name_or_path=model,
            base_model_revision=revision,
            d_model=d,
            num_hidden_layers=n,
            unembed_hash=_unembed_hash(bridge),
        )
        return cls(weight=torch.zeros(n, d, d), bias=torch.zeros(n, d), config=config)

    def translate(self, stream: Stream) -> Stream:
        """The stream of every layer (embedding first) as the last layer would write it, float32.

        Raises ``InputError`` for the stream of a model of another depth or width.
        """
        self._require_shape(len(stream) - 1, stream.shape[-1])
        return translate(stream, self.weight.to(stream.device), self.bias.to(stream.device))

    def permuted(self, *, seed: int = 0) -> "TunedLens":
        """A control: the same translators with the stream's coordinates shuffled.

        P A P^T and P b have the norm and the singular values of A and b.
        """
        order = torch.randperm(self.bias.shape[1], generator=torch.Generator().manual_seed(seed))
        weight = self.weight[:, order][:, :, order]
        return TunedLens(weight=weight, bias=self.bias[:, order], config=self.config)

    def save(self, folder: str | Path) -> None:
        """Write the public package's ``config.json``, and its tensors as ``params.safetensors``.

        Tensor ``0.weight`` is A of the embedding, ``1.weight`` that of block 0, and so on.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.weight": A.contiguous() for i, A in enumerate(self.weight)}
        tensors |= {f"{i}.bias": b.contiguous() for i, b in enumerate(self.bias)}
        with replacing(folder / PARAMETERS) as beside:
            save_file(tensors, beside)
        (folder / CONFIG).write_text(json.dumps(self.config.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, *, bridge: TransformerBridge | None = None) -> "TunedLens":
        """Read what ``save`` wrote; with a ``bridge``, only if the lens was trained for its model.

        Raises ``InputError`` for a folder that holds no lens, one that holds a pickle only, tensors
        that do not fit the config, and a lens for another number of layers, width or unembedding.
        """
        folder = Path(folder)
        _require_safetensors(folder)
        config = checked(LensConfig, read_json(folder / CONFIG), folder / CONFIG)
        n, d = config.num_hidden_layers, config.d_model
        expected = {f"{i}.weight": (d, d) for i in range(n)} | {f"{i}.bias": (d,) for i in range(n)}
        tensors, _ = read_tensors(folder / PARAMETERS)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in expected | found:
            if expected.get(name) != found.get(name):
                raise InputError(
                    f"{folder / PARAMETERS}: tensor {name} has shape {found.get(name, 'none')}, "
                    f"config.json says {expected.get(name, 'there is none')}; save the lens again"
                )
        lens = cls(
            weight=torch.stack([tensors[f"{i}.weight"].float() for i in range(n)]),
            bias=torch.stack([tensors[f"{i}.bias"].float() for i in range(n)]),
            config=config,
        )
        if bridge is not None:
            lens._require_shape(bridge.cfg.n_layers, bridge.cfg.d_model)
            if config.unembed_hash and config.unembed_hash != _unembed_hash(bridge):
                raise InputError(
                    f"{folder}: the lens was trained for {config.base_model_name_or_path!r}, whose "
                    "unembedding is not this model's; give the lens of this model, or train one"
                )
        return lens

    def _require_shape(self, n_layers: int, d_model: int) -> None:
        n, width = self.bias.shape
        if (n, width) != (n_layers, d_model):
            raise InputError(
                f"the lens of {self.config.base_model_name_or_path!r} has {n} translators of "
                f"width {width}, the model {n_layers} layers of width {d_model}; give the lens of "
                "this model, or train one"
            )


def translate(
    stream: Stream,
    weight: Float[Tensor, "translator out d_model"],
    bias: Float[Tensor, "translator d_model"],
) -> Stream:
    """h + A h + b of the embedding and every block but the last, which stays; float32."""
    layers = [h + h @ A.T + b for h, A, b in zip(stream.float(), weight, bias)]
    return torch.stack([*layers, stream[-1].float()])


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not readable ({error}); delete it and train again") from None


# ------------------------------------------------------------------------------------- internals
def _unembed_hash(bridge: TransformerBridge) -> str:
    """As the public package computes it: of the matrix as NumPy prints it, with one decimal."""
    matrix = bridge.W_U.detach().T.float().cpu().numpy()
    with np.printoptions(edgeitems=3, threshold=1000, linewidth=75, suppress=False):
        return sha256(np.array_str(matrix, precision=1).encode()).hexdigest()


def _require_safetensors(folder: Path) -> None:
    if (folder / PARAMETERS).is_file():
        return
    if (folder / "params.pt").is_file():
        raise InputError(
            f"{folder} holds params.pt, a pickle, which may run code when it is read; expected "
            f"{PARAMETERS}. If you trust it, convert it once: "
            "safetensors.torch.save_file(torch.load('params.pt', weights_only=True), "
            f"'{PARAMETERS}')"
        )
    raise InputError(f"{folder} holds no tuned lens; expected a folder with {PARAMETERS}")
