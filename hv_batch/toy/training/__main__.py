"""Train the toy model from scratch: `python -m hv_batch.toy.training OUT`, on a GPU if there is one.

    captions -> text towers;  frames -> VAE;  both, frozen -> DiT

OUT becomes a model_base in the released layout. Parts that exist in OUT are kept, so the same command resumes an
interrupted training at the part that was in progress. `--shipped` starts with the parts in the package, and `--pack`
writes the result into the package. Needs the `train` extra. Progress is logged to stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from hv_batch.engine.text_encoders import TextTowers
from hv_batch.job.log_records import LogSettings, configure_logging
from hv_batch.toy import trained
from hv_batch.toy.training import dit, towers, vae


def main(
    out: Annotated[Path, typer.Argument(help="folder of the checkpoint")],
    seed: int = 0,
    shipped: Annotated[bool, typer.Option("--shipped", help="start with the parts in the package")] = False,
    pack: Annotated[bool, typer.Option("--pack", help="write the result into the package")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda if there is a GPU")] = "",
) -> None:
    """Train the text towers, the VAE and the DiT of the toy checkpoint. Parts that exist are kept."""
    configure_logging(LogSettings("info"))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.benchmark = True  # there are few shapes, and each occurs often
    has_towers = (out / "text_encoder_2" / "model.safetensors").is_file()
    if shipped and not has_towers:
        trained.unpack(out)
    elif not has_towers:
        towers.train_towers(out, towers.Settings(seed=seed), place)
    autoencoder = vae.load_vae(out, place) or vae.train_vae(out, vae.Settings(seed=seed), place)
    frozen = TextTowers(out / "text_encoder", out / "text_encoder_2", device="cpu", dtype=torch.float32)
    dit.train_dit(out, autoencoder, frozen, dit.Settings(seed=seed), place)
    if pack:
        trained.pack(out)


if __name__ == "__main__":
    typer.run(main)
