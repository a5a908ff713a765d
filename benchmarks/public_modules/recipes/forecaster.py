import numpy as np
import pandas as pd
import pytorch_lightning as pl
from neuralforecast.losses.pytorch import MSE
from neuralforecast.models import NHITS
from neuralforecast.tsdataset import TimeSeriesDataset, TimeSeriesLoader

from lightning_bilevel import (
    SGD,
    Episode,
    EpisodeLoader,
    FirstOrder,
    ReverseUnroll,
    bilevel,
    hypergradient,
)

pl.seed_everything(0, verbose=False)


def windows(start, days=30):
    """Return a batch: days of a sine with a period, phase and level of its own."""
    period, phase, level = np.random.uniform((5, 0, -1), (12, 6, 1))
    x = np.arange(start, start + 2 * days)
    y = np.sin(2 * np.pi * x / period + phase) + level
    frame = pd.DataFrame({"unique_id": "0", "ds": x, "y": y})
    halves = (
        TimeSeriesDataset.from_df(half)[0] for half in (frame[:days], frame[days:])
    )
    return [next(iter(TimeSeriesLoader(half, batch_size=1))) for half in halves]


model = NHITS(
    h=4,
    input_size=12,
    mlp_units=[[32, 32]] * 3,
    loss=MSE(),
    windows_batch_size=None,
    learning_rate=3e-3,
)
wrapped = bilevel(
    model, inner="blocks.2", outer="blocks", inner_optimizer=SGD(lr=0.1), inner_steps=5
)
earlier, later = zip(*(windows(0) for _ in range(40)), strict=True)
new = [Episode([a], b) for a, b in (windows(0) for _ in range(20))]
before = hypergradient(wrapped, FirstOrder(), new).value.item()
options = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
    False,
)
trainer = pl.Trainer(
    max_epochs=5, accelerator="cpu", callbacks=[ReverseUnroll()], **options
)
trainer.fit(wrapped, EpisodeLoader(inner=list(earlier), outer=list(later)))
after = hypergradient(wrapped, FirstOrder(), new).value.item()
still = bilevel(model, inner="blocks.2", outer="blocks", inner_optimizer=SGD(lr=1e-9))
unadapted = hypergradient(still, FirstOrder(), new).value.item()
print(
    f"new series, adapted in 5 steps: {after:.2f}; before the fit: {before:.2f}; "
    f"without adaptation: {unadapted:.2f}"
)
