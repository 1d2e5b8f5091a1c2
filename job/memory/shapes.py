"""Shapes of well-known trunks, by the name people call them by, for predictions without files."""

from job.model.architecture import TransformerConfig

SHAPES = {  # Llama 2's
    "7b": TransformerConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000),
    "13b": TransformerConfig(dim=5120, n_layers=40, n_heads=40, vocab_size=32000),
    "70b": TransformerConfig(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=32000, ffn_hidden=28672
    ),
}
