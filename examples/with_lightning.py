"""Quantize a network and train it on with Lightning (`pip install lightning`)."""

import lightning
import torch
import torch.nn.functional as F
from digits import accuracy, loaders, network

import mpq


class Training(lightning.LightningModule):
    """An ordinary LightningModule: it knows nothing of quantization."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def training_step(self, batch, _):
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.module(images), labels)

    def configure_optimizers(self):
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


torch.manual_seed(0)
training, test = loaders()
quantized = mpq.ptq(network(), training, mpq.Policy.uniform(8))  # your trained network
trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False,
                            enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
trainer.fit(Training(quantized.module.train()), training)  # Lightning keeps the mode it finds
mpq.export(quantized, "model.onnx", data=test)
print(f"trained {accuracy(quantized.module, test):.2f} %, wrote model.onnx")
