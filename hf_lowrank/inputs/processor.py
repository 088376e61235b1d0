"""The files beside a model that say how its images, sounds and videos become tensors."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from hf_lowrank.inputs.hub import reading
from hf_lowrank.inputs.sources import DEMO, hub_id

# What the processors of transformers read; the tokenizer, a part of them, saves its own.
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def processor_files(source: str) -> dict[str, bytes]:
    """Contents of the processor's files by name, none for a model of text alone.

    A compression changes nothing that they describe, so they are copied as they are; the classes
    that read them may need packages that a compression does not.

    Args:
        source: As for `load_causal_lm`.

    Raises:
        DataError: A file can't be read.
    """
    folder = Path(source)
    is_on_the_hub = not folder.is_dir() and hub_id(source) is not None
    if source == DEMO or not (folder.is_dir() or is_on_the_hub):
        return {}
    with reading(source, "processor", trusted=False):
        if is_on_the_hub:
            folder = Path(snapshot_download(source, allow_patterns=list(FILES)))
        paths = (folder / name for name in FILES)
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
