"""Makes inception.npz by pytorch-fid's own network on rule-made weights, so that the tests need no PyTorch.

    pip install torch torchvision pytorch-fid==0.3.0
    python tests/make_evaluate_fixtures.py

The file here was made with torch 2.13.0 and torchvision 0.29.2.
"""

import json
import pathlib

import numpy as np
import torch
from pytorch_fid import inception
from weights_rule import efficientnet_weights, measured_pictures

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"


def main():
    shapes = {}

    def weights(*_, **__):
        """In the place of the download: the network that is being built gets rule-made tensors of its own shapes."""
        return {name: torch.from_numpy(array) for name, array in efficientnet_weights(shapes).items()}

    load = torch.nn.Module.load_state_dict

    def load_state_dict(module, state, *rest):
        shapes.update({name: tuple(t.shape) for name, t in module.state_dict().items() if "num_batches" not in name})
        return load(module, weights(), strict=False)

    inception.load_state_dict_from_url, torch.nn.Module.load_state_dict = weights, load_state_dict
    network = inception.InceptionV3().eval()
    pictures = torch.from_numpy(np.concatenate(measured_pictures())).permute(0, 3, 1, 2)  # 64 pixels a side: resized to 299 by the network
    with torch.no_grad():
        features_BD = network(pictures)[0][:, :, 0, 0].numpy()
    print(features_BD.shape, features_BD.mean(), features_BD.std(), np.abs(features_BD[0] - features_BD[1]).mean())
    np.savez_compressed(FIXTURES / "inception.npz", features_BD=features_BD[:, ::4], shapes=np.array(json.dumps(shapes)))


if __name__ == "__main__":
    main()
