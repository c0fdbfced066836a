"""Quantize a network and train it on with accelerate: any number of processes, any tracker.

accelerate launch examples/with_accelerate.py
accelerate launch examples/with_accelerate.py --log-with tensorboard   # or wandb, mlflow
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from digits import accuracy, loaders, network

import mpq

parser = argparse.ArgumentParser()
parser.add_argument("--log-with", choices=["tensorboard", "wandb", "mlflow"], default=None)
arguments, _ = parser.parse_known_args()

torch.manual_seed(0)
training, test = loaders()
quantized = mpq.ptq(network(), training, mpq.Policy.uniform(8))  # your trained network

accelerator = Accelerator(cpu=True, log_with=arguments.log_with, project_dir="logs")
accelerator.init_trackers("mpq")
optimizer = torch.optim.SGD(quantized.module.parameters(), lr=0.05, momentum=0.9)
module, optimizer, loader = accelerator.prepare(quantized.module, optimizer, training)
module.train()
for epoch in range(3):
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(images), labels)
        accelerator.backward(loss)
        optimizer.step()
    accelerator.log({"loss": loss.item()}, step=epoch)
accelerator.end_training()

if accelerator.is_main_process:
    mpq.export(quantized, "model.onnx", data=test)
    print(f"trained {accuracy(quantized.module, test):.2f} %, wrote model.onnx")
