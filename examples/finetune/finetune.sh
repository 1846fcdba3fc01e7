#!/usr/bin/env bash
# Trains a small dense model, makes a mixture of experts of it, and fine-tunes these under tensor 2 × expert 2: a few
# minutes on a laptop. Further arguments are overrides of both training runs, such as trainer.max_steps=20.
set -eu

tedlab train parallel=single moe=dense model.activation=swiglu model.bias=false model.norm=rms optim.lr=3e-3 \
  trainer.max_steps=200 hydra.run.dir=runs/finetune/dense "$@"

# Four copies of each dense layer, each in two experts. A token begins by choosing one whole copy; noise tells them apart.
tedlab checkpoint upcycle run=runs/finetune/dense out=runs/finetune/mixture \
  moe=mixtral moe.num_experts=8 moe.top_k=2 moe.ffn=256 noise=0.02

# Routers and experts train, routers at a tenth of the rate; everything else is frozen.
tedlab train weights=runs/finetune/mixture parallel=tp2_ep2 optim.lr=1e-3 \
  "optim.groups=[{pattern: '*.experts.*'}, {pattern: '*.router.*', lr_factor: 0.1}, {pattern: '*', frozen: true}]" \
  trainer.max_steps=200 hydra.run.dir=runs/finetune/experts "$@"
