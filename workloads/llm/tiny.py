"""A language model for machines without a GPU or weights: the whole path of a request, and next to no arithmetic.

A Llama of two small layers with random weights (`load_format: dummy`) and a tokenizer trained on the spot. What
it says is noise, so it tells what serving costs and nothing about a model's speed. Nothing is downloaded.
"""

import json
import os
import tempfile
from pathlib import Path

NAME = "tiny"
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # heads of 32, the smallest that vLLM's CPU attention takes
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
_VOCABULARY_SIZE = 512
_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]


def resolve(source: str) -> str:
    """What vLLM takes as a model: the directory of the tiny one for `tiny`, else `source` itself."""
    return str(directory()) if source == NAME else source


def directory() -> Path:
    """The model's files, made in the user's cache directory the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serve-orchestrator"
    made = cache / f"{NAME}-llama-v1"
    if made.exists():
        return made
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        partial = Path(scratch) / "model"
        partial.mkdir()
        _make(partial)
        try:
            partial.rename(made)  # existence means complete
        except OSError:
            if not made.exists():  # else another process was first, with the same files
                raise
    return made


def _make(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Its own source, and numbers to fill the vocabulary whatever the source says.
    text = [Path(__file__).read_text(), *(str(number * 7919) for number in range(2000))]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    unknown, begin, end = _SPECIAL_TOKENS
    names = {"unk_token": unknown, "bos_token": begin, "eos_token": end}
    ids = {"bos_token_id": tokenizer.token_to_id(begin), "eos_token_id": tokenizer.token_to_id(end)}
    files = {
        "config.json": _CONFIG | ids | {"vocab_size": size},
        "generation_config.json": ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _CONFIG["max_position_embeddings"],
            **names,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
