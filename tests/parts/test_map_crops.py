"Label maps are cropped pixel by pixel, and together with their images."

import torch
from small_encoder import SCENES, seeded

from mimstudy.parts.views import crop_images_and_maps, crop_label_maps, sample_crops


def test_a_map_is_cropped_pixel_by_pixel():
    "Reference: for each new pixel, the old one in which its centre lies."
    boxes, flip = sample_crops(SCENES.images, (0.2, 0.9), (3 / 4, 4 / 3), 0.5, seeded(1))
    for size in (9, 32, 50):
        fast = crop_label_maps(SCENES.maps, boxes, flip, size)
        slow = torch.empty(24, size, size, dtype=torch.uint8)
        for b, ((top, left, height, width), mirrored) in enumerate(zip(boxes.tolist(), flip.tolist())):
            for i in range(size):
                for j in range(size):
                    column = size - 1 - j if mirrored else j
                    row = top + int((i + 0.5) * height / size)
                    slow[b, i, j] = SCENES.maps[b, row, left + int((column + 0.5) * width / size)]
        assert fast.equal(slow)


def test_an_image_and_its_map_are_cropped_together():
    "In images painted from their maps, pixels keep the colour of their label, except at mixed borders."
    squares = torch.arange(32) // 8
    maps = (squares[:, None] + squares[None] % 2 * 10).expand(6, 32, 32).to(torch.uint8)
    painted = (maps[:, None] * 12).expand(-1, 3, -1, -1)
    x, cropped = crop_images_and_maps(painted, maps, 32, (0.5, 1.0), generator=seeded(2))
    distance = (x[:, 0] * 255 / 12 - cropped).abs()
    assert (distance < 0.2).float().mean() > 0.6 and distance.median() < 0.01
