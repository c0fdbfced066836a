"""Training and distillation of float and of prepared models: `loop.fit` is the way in.

- `recipe` (and `recipes/*.yaml`): every hyper-parameter of a run
- `loop`: `fit`; `engine`: one epoch of it; `resume`, `metrics`: what a run leaves in its folder
- `progressive`: quantizers that come down from 8 bits in stages
- `compiled`: the step through torch's compiler; `bf16`: its arithmetic
- `whiten`: a first layer that begins by whitening the images
- `optim`: parameter groups, schedule, moving average
- `objective`: the loss of a recipe; `losses`, `weighting`: its parts, as functions over logits
- `ensemble`: teachers as one module and one file; `evaluate`: logits and accuracy
- `augment`, `trivial`: random changes of a batch of images
"""
