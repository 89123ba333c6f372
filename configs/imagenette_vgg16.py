"""VGG16 on Imagenette at 224x224: 10 classes of photographs, where columns matter.

Paper: the method of AntiDote (arXiv 2008.06543) beside static filter pruning, at equal MACs.
Command: python -m dynprune_jax.main --mode=study --config=configs/imagenette_vgg16.py
    --workdir=DIR --config.data.path=FOLDER
    (FOLDER holds train/<class>/ and val/<class>/, as Imagenette2 is unpacked)
Hardware and time: one data-centre GPU, not measured.
Result: not measured.
"""

from dynprune_jax.config import imagenet_config


def get_config():
    config = imagenet_config()
    config.model = "vgg16"
    config.batch_size = 64
    config.log_every_steps = 49
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 10
    config.data.name = "class_folders"
    config.data.test_split = "test"
    config.gate.channel_ratio = (0.2, 0.2, 0.2, 0.5, 0.6)
    config.gate.column_ratio = (0.5, 0.5, 0.5, 0.5, 0.5)
    config.dense.epochs = 100
    config.dense.learning_rate = 0.05
    config.prune.epochs = 40
    config.optim.weight_decay = 5e-4

    config.study.seeds = (0,)
    config.study.methods = ("attention", "predicted", "l1", "taylor")
    config.study.ablations = ("channels", "columns", "random", "no_dropout", "distillation")
    return config
