"""ResNet-18 a quarter as wide on Imagenette at 128x128: the study that two CPU cores can do.

Paper: the method of AntiDote (arXiv 2008.06543) beside static filter pruning, at equal MACs.
Command: python -m dynprune_jax.main --mode=study --config=configs/imagenette_resnet18_small.py
    --workdir=DIR --config.data.path=FOLDER
    (FOLDER holds train/<class>/ and val/<class>/, as Imagenette2 is unpacked)
Hardware and time: 2 CPU cores, the dense network half an hour; then a quarter of an hour a run,
    two side by side.
Result: dense 82.7 %; with 40 % of the MACs removed 82.8 % by predicted gates (2 seeds), 74.0 % by
    attention on columns, 71.9 % on channels, 82.4 % by static pruning (3 seeds);
    docs/results/imagenette_resnet18_small has every run.
"""

from dynprune_jax.config import imagenet_config


def get_config():
    config = imagenet_config()
    config.model = "resnet18"
    config.width = 0.25
    config.dtype = "float32"
    config.batch_size = 64
    config.log_every_steps = 49
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 10
    config.data.name = "class_folders"
    config.data.test_split = "test"
    config.data.image_size = 128
    config.data.stored_size = 128
    config.data.resized_crop = False
    config.data.crop_padding = 16
    config.gate.channel_ratio = (0.4, 0.4, 0.4, 0.4)
    config.gate.layers = ("*",)
    config.ascent.increment = 0.1
    config.ascent.interval_epochs = 0.3
    config.dense.epochs = 25
    config.dense.learning_rate = 0.1
    config.dense.warmup_epochs = 1.0
    config.prune.epochs = 8
    config.prune.learning_rate = 0.05
    config.optim.weight_decay = 5e-4
    config.optim.label_smoothing = 0.0

    config.study.seeds = (0, 1, 2)
    config.study.cuts = (0.4, 0.55)
    config.study.methods = (
        "channels",
        "columns",
        "both",
        "block_columns",
        "predicted",
        "predicted+block_columns",
        "l1",
    )
    config.study.ablations = ()
    return config
