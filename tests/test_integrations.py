"""Adapters, each with the real library; where that is missing the test says so and is skipped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import cgmq_fx
from cgmq_fx import OptionError, Prepared
from tests.nets import small_classifier

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours

BUDGET = "bops <= 5%"


def prepared(search_steps: int) -> Prepared:
    torch.manual_seed(0)
    found = cgmq_fx.prepare(small_classifier(), BUDGET, torch.rand(2, 3), search_steps=search_steps)
    found.calibrate([torch.rand(8, 3)])
    return found


def loader(batch: int = 4) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(32, 3), torch.arange(32) % 2), batch)


@pytest.mark.parametrize(("accumulate", "taken"), [(1, 16), (2, 8)])
def test_lightning(accumulate: int, taken: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="no Lightning: not tested with it")
    from cgmq_fx.integrations.lightning import QuantizationCallback

    model = prepared(100)

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = model.model

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[QuantizationCallback(model)],
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), loader())
    assert model.controller.taken == taken
    assert float(trainer.logged_metrics["cost/bops"]) == pytest.approx(model.cost[0].value)
    assert model.finalize().cost.satisfied


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="no Transformers: not tested with it")
    pytest.importorskip("accelerate", reason="no Accelerate: the Trainer needs it")
    from cgmq_fx.integrations.transformers import QuantizationCallback

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    net = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(20, (16, 6))
    model = cgmq_fx.prepare(net, "bops <= 20%", {"input_ids": tokens[:2]}, search_steps=100)
    model.calibrate([{"input_ids": tokens}])
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]
    trainer = transformers.Trainer(
        model.model,
        transformers.TrainingArguments(
            tmp_path,
            per_device_train_batch_size=4,
            num_train_epochs=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        ),
        train_dataset=rows,
        compute_loss_func=lambda output, labels, **_: cross_entropy(output["logits"], labels),
        callbacks=[QuantizationCallback(model)],
    )
    trainer.train()
    assert model.controller.taken == 8
    logged = [entry["cost/bops"] for entry in trainer.state.log_history if "cost/bops" in entry]
    assert len(logged) >= 8
    assert model.finalize().cost.satisfied


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="no Accelerate: not tested with it")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = prepared(100)
    own = torch.optim.Adam(model.model.parameters())
    net, optimizer, data = accelerator.prepare(model.model, own, loader())
    for inputs, target in data:
        with accelerator.accumulate(net):
            accelerator.backward(cross_entropy(net(inputs), target))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                model.step()
    assert model.controller.taken == 4
    assert model.finalize().cost.satisfied


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_library_the_error_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"cgmq_fx.integrations.{name}", raising=False)
    with pytest.raises(OptionError, match=rf"pip install \"cgmq-fx\[{name}\]\""):
        __import__(f"cgmq_fx.integrations.{name}")


def test_nothing_of_them_is_imported_by_the_library_itself() -> None:
    assert isinstance(small_classifier(), nn.Module)
    names = {"pytorch_lightning", "transformers", "accelerate", "tensorboard"}
    source = Path(cgmq_fx.__file__).parent
    files = [*source.glob("*.py"), *source.glob("cli/*.py")]
    assert not [
        f
        for f in files
        for line in f.read_text().splitlines()
        if any(line.startswith((f"import {n}", f"from {n}")) for n in names)
    ]
