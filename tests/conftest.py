import pytest
from pathlib import Path
@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory):
    from lorakit.testing.models import make_tiny_sd1
    return make_tiny_sd1(tmp_path_factory.mktemp("m")/"tiny")
@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    from skimage import data
    from PIL import Image
    f=tmp_path_factory.mktemp("p")
    for n in ("astronaut","chelsea","coffee","rocket"):
        Image.fromarray(getattr(data,n)()).resize((96,80)).save(f/f"{n}.png"); (f/f"{n}.txt").write_text(f"a photo of {n}, red")
    return f
