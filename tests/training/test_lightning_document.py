"""Every example of Lightning's document on transfer learning: its own modules with our callback, and our module."""

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import peft_func as pf
from tests.training.lightning_runs import QUIET, Log, trainer
from tests.training.nets import copy_of, equal

F = nn.functional
pytestmark = QUIET


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def images(count=8, size=8, classes=10):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, size, size, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, classes, (count,), generator=generator)), 4)


def sgd(named):
    return torch.optim.SGD([p for _, p in named], lr=0.1)


# ---- Transfer learning: a pretrained LightningModule as a feature extractor


class AutoEncoder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 100), nn.BatchNorm1d(100))
        self.decoder = nn.Linear(100, 192)

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, index):
        return F.mse_loss(self.decoder(self.encoder(batch[0])), batch[0].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class CIFAR10Classifier(pl.LightningModule):
    def __init__(self, path):
        super().__init__()
        self.feature_extractor = AutoEncoder.load_from_checkpoint(path)
        self.feature_extractor.freeze()
        self.classifier = nn.Linear(100, 10)

    def forward(self, x):
        return self.classifier(self.feature_extractor(x))

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture
def pretrained(tmp_path):
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(AutoEncoder(), images())
    runner.save_checkpoint(tmp_path / "auto.ckpt")
    return tmp_path / "auto.ckpt"


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training")  # as freeze() has it
def test_a_pretrained_module_as_a_feature_extractor_with_the_callback(tmp_path, pretrained):
    module, log = CIFAR10Classifier(pretrained), Log()
    before = copy_of(module)
    callback = pf.lightning.FunctionalFinetuning(pf.schedule({0: "classifier"}))
    trainer(tmp_path, callback, log, max_epochs=2).fit(module, images())
    assert changed(before, module) == {"classifier.weight", "classifier.bias"}
    assert not module.feature_extractor.training
    assert log.rows[-1]["loss"] < log.rows[0]["loss"]


def test_a_pretrained_module_as_a_feature_extractor_of_a_functional_module(tmp_path, pretrained):
    encoder = AutoEncoder.load_from_checkpoint(pretrained).encoder
    net = nn.Sequential(encoder, nn.Linear(100, 10)).train()
    options = {"loss": F.cross_entropy, "optimizer": sgd, "always_eval": pf.of_type(nn.BatchNorm1d)}
    module = pf.lightning.FunctionalModule(net, pf.train("1"), **options)
    plain, log = CIFAR10Classifier(pretrained), Log()
    plain.classifier.load_state_dict(net[1].state_dict())
    trainer(tmp_path, log, max_epochs=2).fit(module, images())
    peer = Log()
    with pytest.warns(UserWarning, match="eval mode"):
        trainer(tmp_path, peer, max_epochs=2).fit(plain, images())
    assert [row["loss"] for row in log.rows] == pytest.approx([row["loss"] for row in peer.rows], abs=1e-6)
    names = {name for name in module.state_dict() if not name.startswith("adapted.net.")}
    assert names == {"adapted.train.1.weight", "adapted.train.1.bias"}


# ---- Imagenet: a ResNet of torchvision's shape


class Block(nn.Module):
    def __init__(self, inside, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1, self.layer2 = Block(8, 8, 1), Block(8, 16, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 1000)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet():
    torch.manual_seed(0)
    net = ResNet()
    with torch.no_grad():
        for _ in range(3):  # "pretrained": statistics that are not those of the start
            net(torch.randn(8, 3, 8, 8))
    return net


class ImagenetTransferLearning(pl.LightningModule):
    def __init__(self):
        super().__init__()
        backbone = resnet()
        num_filters = backbone.fc.in_features
        self.feature_extractor = nn.Sequential(*list(backbone.children())[:-1])
        self.classifier = nn.Linear(num_filters, 10)

    def forward(self, x):
        self.feature_extractor.eval()
        with torch.no_grad():
            representations = self.feature_extractor(x).flatten(1)
        return self.classifier(representations)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Trainable(ImagenetTransferLearning):
    """The same, with nothing about modes and gradients in it: that is the callback's."""

    def forward(self, x):
        return self.classifier(self.feature_extractor(x).flatten(1))


def test_imagenet_transfer_with_the_callback_is_what_the_document_writes_by_hand(tmp_path):
    curves = []
    for kind in (ImagenetTransferLearning, Trainable):
        module, log = kind(), Log()
        before = copy_of(module)
        callback = pf.lightning.FunctionalFinetuning(pf.schedule({0: "classifier"}))
        runner = trainer(tmp_path, callback, log, max_epochs=2)
        runner.fit(module, images())
        assert changed(before, module) == {"classifier.weight", "classifier.bias"}
        curves.append([row["loss"] for row in log.rows])
    assert curves[0] == curves[1]
    runner.save_checkpoint(tmp_path / "imagenet.ckpt")
    model = Trainable.load_from_checkpoint(tmp_path / "imagenet.ckpt")
    model.freeze()
    x, _ = next(iter(images()))
    assert torch.equal(model(x), module.eval()(x))


def test_imagenet_transfer_then_the_backbone(tmp_path):
    module, log = Trainable(), Log()
    schedule = pf.BackboneSchedule(unfreeze_at=1)
    callback = pf.lightning.BackboneFinetuning("feature_extractor", schedule, train_norms=False)
    before = copy_of(module)
    trainer(tmp_path, callback, log, max_epochs=2).fit(module, images())
    convolutions = {name for name, p in module.named_parameters() if p.ndim == 4}
    assert changed(before, module) == convolutions | {"classifier.weight", "classifier.bias"}


def test_imagenet_transfer_with_a_functional_module(tmp_path):
    net = resnet()
    net.fc = nn.Linear(16, 10)
    method = pf.chain(pf.lora(pf.of_type(nn.Conv2d), rank=2), pf.train("fc"))
    options = {"loss": F.cross_entropy, "optimizer": sgd, "always_eval": pf.of_type(nn.BatchNorm2d)}
    module, log = pf.lightning.FunctionalModule(net, method, **options), Log()
    before = copy_of(module)
    runner = trainer(tmp_path, log, max_epochs=2)
    runner.fit(module, images())
    assert changed(before, module) == {name for name, _ in module.named_parameters()}
    runner.save_checkpoint(tmp_path / "imagenet.ckpt")
    kind = pf.lightning.FunctionalModule
    model = kind.load_from_checkpoint(tmp_path / "imagenet.ckpt", net=net, method=method, loss=F.cross_entropy)
    model.freeze()
    predictions = torch.cat(trainer(tmp_path).predict(model, images()))
    assert predictions.shape == (8, 10)
    net.load_state_dict(module.merged_state_dict(), strict=True)
    x = torch.cat([x for x, _ in images()])
    torch.testing.assert_close(net.eval()(x), predictions, rtol=1e-4, atol=1e-5)


# ---- BERT


def config(**options):
    return transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **options
    )


def sentences(count=8):
    generator = torch.Generator().manual_seed(0)
    rows = {
        "input_ids": torch.randint(1, 32, (count, 6), generator=generator),
        "attention_mask": torch.ones(count, 6, dtype=torch.int64),
        "token_type_ids": torch.zeros(count, 6, dtype=torch.int64),
        "labels": torch.randint(0, 3, (count,), generator=generator),
    }
    return DataLoader([{name: value[i] for name, value in rows.items()} for i in range(count)], 4)


class BertMNLIFinetuner(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bert = transformers.BertModel(config(attn_implementation="eager"))
        self.W = nn.Linear(self.bert.config.hidden_size, 3)
        self.num_classes = 3

    def forward(self, input_ids, attention_mask, token_type_ids):
        output = self.bert(input_ids, attention_mask, token_type_ids, output_attentions=True)
        return self.W(output.last_hidden_state[:, 0]), output.attentions

    def training_step(self, batch, index):
        labels = batch.pop("labels")
        logits, attentions = self(**batch)
        assert len(attentions) == 2
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_bert_with_the_callback(tmp_path):
    module, log = BertMNLIFinetuner(), Log()
    before = copy_of(module)
    schedule = {0: ["W"], 1: pf.path("W.*") | pf.path(r"bert\.encoder\.layer\.1\..*")}
    trainer(tmp_path, pf.lightning.FunctionalFinetuning(pf.schedule(schedule)), log, max_epochs=2).fit(
        module, sentences()
    )
    moved = changed(before, module)
    assert {"W.weight", "W.bias"} < moved
    assert {name.rpartition("layer.1.")[0] for name in moved if name.startswith("bert")} == {"bert.encoder."}
    assert log.of_epochs("trains")[0] == {"W.weight", "W.bias"}


@pytest.mark.parametrize(
    "loss", [None, lambda output, target: F.cross_entropy(output.logits, target)], ids=["own", "given"]
)
def test_bert_with_a_functional_module(tmp_path, loss):
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(config(num_labels=3))
    method = pf.chain(pf.lora(["query", "value"], rank=2), pf.train("classifier"))
    module, log = pf.lightning.FunctionalModule(net, method, loss=loss), Log()
    before = copy_of(module)
    runner = trainer(tmp_path, log, max_epochs=4)
    runner.fit(module, sentences(), sentences())
    assert changed(before, module) == {name for name, _ in module.named_parameters()}
    assert all(".lora." in name or name.startswith("adapted.train.classifier.") for name in module.state_dict())
    assert {"train_loss", "val_loss"} <= set(runner.progress_bar_metrics)
    output = runner.predict(module, sentences())[0]
    assert output.logits.shape == (4, 3)


# ---- Finetuning: FeatureExtractorFreezeUnfreeze


class MyModel(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.feature_extractor = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.linear = nn.Linear(8, 10)
        for p in self.feature_extractor.parameters():
            p.requires_grad = False

    def training_step(self, batch, index):
        return F.cross_entropy(self.linear(self.feature_extractor(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()))


class FeatureExtractorFreezeUnfreeze(pf.lightning.FunctionalFinetuning):
    def __init__(self, unfreeze_at_epoch=10):  # the document does not call super().__init__()
        self._unfreeze_at_epoch = unfreeze_at_epoch

    def selection(self, epoch):
        return ".*" if epoch >= self._unfreeze_at_epoch else ~pf.path(r"feature_extractor\..*")


class Theirs(pl.callbacks.BaseFinetuning):
    def __init__(self, unfreeze_at_epoch=10):
        super().__init__()
        self._unfreeze_at_epoch = unfreeze_at_epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.feature_extractor, train_bn=False)

    def finetune_function(self, pl_module, current_epoch, optimizer):
        if current_epoch == self._unfreeze_at_epoch:
            self.unfreeze_and_add_param_group(modules=pl_module.feature_extractor, optimizer=optimizer, train_bn=True)


def test_the_freeze_unfreeze_callback_of_the_document(tmp_path):
    logs = []
    for kind in (FeatureExtractorFreezeUnfreeze, Theirs):
        log, module = Log(), MyModel()
        trainer(tmp_path, kind(unfreeze_at_epoch=7), log, max_epochs=9).fit(module, images())
        logs.append(log)
    ours, theirs = logs
    head, body = (
        ["linear.weight", "linear.bias"],
        [f"feature_extractor.{i}.{k}" for i in (1, 2) for k in ("weight", "bias")],
    )
    assert ours.of_epochs("groups") == theirs.of_epochs("groups") == [[head]] * 7 + [[head, body]] * 2
    assert ours.of_epochs("rates") == theirs.of_epochs("rates")
    assert [row["loss"] for row in ours.rows] != [row["loss"] for row in theirs.rows]  # of batch statistics


def test_one_callback_needs_no_list(tmp_path):
    runner = pl.Trainer(
        callbacks=FeatureExtractorFreezeUnfreeze(unfreeze_at_epoch=7),
        fast_dev_run=True,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    runner.fit(MyModel(), images())


def test_freeze_unfreeze_with_a_functional_module(tmp_path):
    model = MyModel()
    net = nn.Sequential(model.feature_extractor, model.linear)
    base = copy_of(net)
    module = pf.lightning.FunctionalModule(
        net,
        pf.chain(pf.train("1", name="head"), pf.lora(r"0\.1", rank=2)),
        loss=F.cross_entropy,
        always_eval=pf.of_type(nn.BatchNorm1d),
    )

    class Unfreeze(FeatureExtractorFreezeUnfreeze):
        def selection(self, epoch):
            return ".*" if epoch >= self._unfreeze_at_epoch else r"adapted\.head\..*"

    log = Log()
    trainer(tmp_path, Unfreeze(unfreeze_at_epoch=2), log, max_epochs=3).fit(module, images())
    head = ["adapted.head.1.weight", "adapted.head.1.bias"]
    lora = ["adapted.lora.0.1.weight.A", "adapted.lora.0.1.weight.B"]
    assert log.of_epochs("groups") == [[head], [head], [head, lora]]
    assert log.of_epochs("rates")[2] == pytest.approx([1e-3, 1e-4])
    assert equal(copy_of(net), base)
