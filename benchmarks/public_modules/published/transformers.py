"""Language models in a Lightning module as in its documentation: the loss is the model's own."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from published import Row

DISTRIBUTION = "transformers"
SIZE = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


class Transformer(pl.LightningModule):
    """Any model that returns its loss.

    Args:
        model: of the package.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def text(labels: int | None = None) -> list[dict]:
    """Return two batches of tokens, with labels of the sequences or the tokens themselves."""
    tokens = torch.randint(2, 20, (2, 4, 6))
    return [{"input_ids": x, "labels": x if labels is None else torch.randint(labels, (4,))} for x in tokens]


def gpt2() -> Row:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    module = Transformer(GPT2LMHeadModel(config))
    return Row(module, text(), inner="model.transformer.h.1", outer="model.transformer.h.0")


def bert() -> Row:
    module = Transformer(BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)))
    return Row(module, text(labels=3), inner="model.classifier", outer="model.bert.encoder")


def llama() -> Row:
    module = Transformer(LlamaForCausalLM(LlamaConfig(**SIZE, bos_token_id=0, eos_token_id=1, pad_token_id=0)))
    return Row(module, text(), inner="model.lm_head", outer="model.model.layers")


def t5() -> Row:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    module = Transformer(T5ForConditionalGeneration(config))
    return Row(module, text(), inner="model.decoder", outer="model.encoder")


def vit() -> Row:
    size = {**SIZE, "image_size": 8, "patch_size": 4, "num_labels": 3}
    del size["vocab_size"]
    module = Transformer(ViTForImageClassification(ViTConfig(**size)))
    batches = [{"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.randint(3, (4,))} for _ in range(2)]
    return Row(module, batches, inner="model.classifier", outer="model.vit")


ROWS = {
    "GPT2LMHeadModel": gpt2,
    "BertForSequenceClassification": bert,
    "LlamaForCausalLM": llama,
    "T5ForConditionalGeneration": t5,
    "ViTForImageClassification": vit,
}
