"""Writes a tiny llama model with random weights, which the real llama.cpp loads and runs. Its answers are gibberish.

    python tests/support/tiny_gguf.py tiny.gguf [--seed 7] [--megabytes 100]

The vocabulary is letters, a few hundred syllables and the 256 byte tokens, so that any prompt can be read and most of
what comes out is printable. The output layer is scaled so that the end token is unlikely: a test asks for the length
it wants with `max_tokens`.
"""

import argparse
import string
from itertools import product
from pathlib import Path

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD, CONTEXT = 2, 64, 4, 2, 128, 8192
HEAD_WIDTH = WIDTH // HEADS
SPACE = "\u2581"
TURN = "<|turn|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + (message['content'] or '') + '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

Token = tuple[str, float, gguf.TokenType]


def write_tiny_gguf(path: Path, *, seed: int = 0, megabytes: int = 0) -> Path:
    """Writes the model; `megabytes` widens its feed-forward layers until the file has about that size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = _vocabulary()
    feed_forward = max(FEED_FORWARD, megabytes * 1_000_000 // (3 * LAYERS * WIDTH * 2) // 64 * 64)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, path.stem, tokens, feed_forward)
    for name, values in _tensors(np.random.default_rng(seed), tokens, feed_forward):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary() -> list[Token]:
    kinds = gguf.TokenType
    control = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL), (TURN, kinds.CONTROL)]
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
    words = [SPACE + syllable for syllable in syllables] + syllables
    letters = [SPACE, "\n", *string.digits, *string.ascii_letters, *string.punctuation]
    return [
        *((text, 0.0, kind) for text, kind in control),
        *((f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)),
        *((text, -float(rank), kinds.NORMAL) for rank, text in enumerate(words + letters)),
    ]


def _describe(writer: gguf.GGUFWriter, name: str, tokens: list[Token], feed_forward: int) -> None:
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONTEXT)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_chat_template(TEMPLATE)


def _tensors(random: np.random.Generator, tokens: list[Token], feed_forward: int) -> list[tuple[str, np.ndarray]]:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(columns, dtype=np.float32)

    kv_width = HEAD_WIDTH * KV_HEADS
    output = 3 * matrix(len(tokens), WIDTH)
    output[[kind != gguf.TokenType.NORMAL for _, _, kind in tokens]] *= 0.01
    tensors = [("token_embd", WIDTH * matrix(len(tokens), WIDTH)), ("output_norm", None), ("output", output)]
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv_width, WIDTH),
            "attn_v": (kv_width, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (feed_forward, WIDTH),
            "ffn_up": (feed_forward, WIDTH),
            "ffn_down": (WIDTH, feed_forward),
        }
        tensors += [(f"blk.{layer}.{name}", matrix(*shape)) for name, shape in shapes.items()]
        tensors += [(f"blk.{layer}.{name}", None) for name in ("attn_norm", "ffn_norm")]
    ones = np.ones(WIDTH, dtype=np.float32)  # norms stay float32: llama.cpp asks for it
    return [(f"{name}.weight", ones if values is None else values.astype(np.float16)) for name, values in tensors]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny llama model with random weights.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=0)
    wanted = parser.parse_args()
    written = write_tiny_gguf(wanted.path, seed=wanted.seed, megabytes=wanted.megabytes)
    print(f"{written}: {written.stat().st_size / 1e6:.2f} MB")
