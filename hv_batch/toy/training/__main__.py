"""Train the toy model from nothing: `python -m hv_batch.toy.training OUT`, on a GPU where there is one.

    captions -> text towers;  frames -> VAE;  both, frozen -> DiT

OUT becomes a model_base in the released layout. A part that lies there already is kept, so a training that was broken
off goes on with the part it was at. `--shipped` begins with the parts that the package has, and `--pack` puts into the
package what came out. Needs the `train` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from hv_batch.engine.text_encoders import TextTowers
from hv_batch.toy import trained
from hv_batch.toy.training import dit, towers, vae


def main(
    out: Annotated[Path, typer.Argument(help="folder of the checkpoint")],
    seed: int = 0,
    shipped: Annotated[bool, typer.Option("--shipped", help="begin with the parts that the package has")] = False,
    pack: Annotated[bool, typer.Option("--pack", help="put what came out into the package")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu; default: what is there")] = "",
) -> None:
    """Train the towers, the VAE and the DiT of the toy checkpoint, each where it is missing."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.benchmark = True  # there are few shapes, and each comes often
    is_begun = (out / "text_encoder_2" / "model.safetensors").is_file()
    if shipped and not is_begun:
        trained.unpack(out)
    elif not is_begun:
        towers.train_towers(out, towers.Settings(seed=seed), place, print)
    autoencoder = vae.load_vae(out, place) or vae.train_vae(out, vae.Settings(seed=seed), place, print)
    frozen = TextTowers(out / "text_encoder", out / "text_encoder_2", device="cpu", dtype=torch.float32)
    dit.train_dit(out, autoencoder, frozen, dit.Settings(seed=seed), place, print)
    if pack:
        trained.pack(out)


if __name__ == "__main__":
    typer.run(main)
