"The README's example runs as it is printed."

import re
from pathlib import Path

from PIL import Image

from mimstudy.core.scenes import scenes

ROOT = Path(__file__).resolve().parents[1]


def save_images(folder, n, seed):
    "Scenes as files in folders of two classes."
    for i, image in enumerate(scenes(n, 64, seed=seed).images):
        file = folder / ('even', 'odd')[i % 2] / f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def test_the_example_runs(tmp_path, monkeypatch):
    save_images(tmp_path / 'data' / 'my-images' / 'train', 140, 0)
    save_images(tmp_path / 'data' / 'my-images' / 'val', 20, 1)
    monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))
    monkeypatch.chdir(tmp_path)
    code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text('utf-8'), re.S).group(1)
    names = {}
    exec(compile(code, 'README.md', 'exec'), names)
    assert (tmp_path / 'runs' / 'my-images' / 'task.safetensors').is_file()
    assert {'linear/best/prefix', 'knn/4/patch'} <= set(names['scores'])
