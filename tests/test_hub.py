"Weights in the form of the Hugging Face Hub."

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from genrobust.attacks import deepfool
from genrobust.data import synthetic
from genrobust.hub import from_hub, to_hub
from genrobust.models import digest, load_pretrained


@pytest.fixture(scope='module', autouse=True)
def hub():
    return pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')


@pytest.mark.parametrize('name', ['gfz', 'cnn'])
def test_a_model_comes_back_from_a_folder(name, tmp_path):
    clf = load_pretrained(name, 'cpu')
    to_hub(clf).save_pretrained(tmp_path)
    assert {'config.json', 'model.safetensors'} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / 'config.json').read_text())['classifier'] == clf.config
    again = from_hub(str(tmp_path), local_files_only=True)
    assert type(again) is type(clf) and again.config == clf.config and not again.training
    assert digest(again.state_dict()) == digest(clf.state_dict())
    assert not any(p.requires_grad for p in again.parameters())
    x = synthetic(3).x
    assert torch.equal(again.fixed(0)(x), clf.fixed(0)(x))
    assert torch.equal(deepfool(again, x).x_adv, deepfool(clf, x).x_adv)


def test_the_weights_are_shared_and_a_missing_folder_is_told(tmp_path):
    clf = load_pretrained('cnn', 'cpu')
    model = to_hub(clf)
    assert model.clf is clf and torch.equal(model(synthetic(2).x), clf(synthetic(2).x))
    with pytest.raises(Exception, match='none'):
        from_hub(str(tmp_path / 'none'), local_files_only=True)


def test_the_package_does_not_need_it():
    "Without the extra the module is imported, and its functions name what is missing"
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        'import genrobust.hub, genrobust.models\n'
        'try: genrobust.hub.to_hub(genrobust.models.CNN())\n'
        "except ImportError as e: assert 'huggingface_hub' in str(e)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_repository_that_lacks_weights_is_refused(tmp_path):
    to_hub(load_pretrained('cnn', 'cpu')).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors.popitem()
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match='Missing key'):
        from_hub(str(tmp_path), local_files_only=True)
