"""ResNet-18 on Imagenette at 224x224: channels against columns against both.

Paper: the method of AntiDote (arXiv 2008.06543) beside static filter pruning, at equal MACs.
Command: python -m dynprune_jax.main --mode=study --config=configs/imagenette_resnet18.py
    --workdir=DIR --config.data.path=FOLDER
    (FOLDER holds train/<class>/ and val/<class>/, as Imagenette2 is unpacked)
Hardware and time: one data-centre GPU, not measured.
Result: not measured. imagenette_resnet18_small.py is what two CPU cores can do of it.
"""

from dynprune_jax.config import imagenet_config


def get_config():
    config = imagenet_config()
    config.model = "resnet18"
    config.batch_size = 64
    config.log_every_steps = 49
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 10
    config.data.name = "class_folders"
    config.data.test_split = "test"
    config.gate.channel_ratio = (0.4, 0.4, 0.4, 0.4)
    config.gate.layers = ("*",)
    config.dense.epochs = 100
    config.dense.learning_rate = 0.05
    config.prune.epochs = 40
    config.optim.weight_decay = 5e-4

    config.study.seeds = (0,)
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
