"""Who gets which GPU, by Ray's books: in a Ray of its own, which is told of two GPUs that are not there."""

import subprocess
import sys

SEE = """
import os, ray
from amalgam.errors import UserError
from amalgam.rl import cluster

cluster._authenticate(private=True)
ray.init(num_cpus=1, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)

class Actor:
    def sees(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

def start(group, index):
    return ray.remote(Actor).options(**cluster.resources(0.5, group, index)).remote()

try:
    cluster.gpu_group(3, 1.0)
except UserError as error:
    print(error)
group = cluster.gpu_group(2, 60.0)
actors = [start(group, index) for index in (0, 1, 1, 0, 0)]
print(*cluster.wait([actor.sees.remote() for actor in actors], "the actors", 60.0))
"""


def test_colocated_actors_share_their_bundles_gpu():
    told = subprocess.run([sys.executable, "-P", "-c", SEE], capture_output=True, text=True, timeout=120, check=True)
    refused, seen = told.stdout.splitlines()
    assert refused == "resources.placement: colocated takes 3 GPUs, and there are 2"
    a, b, *rest = seen.split()
    assert {a, b} == {"0", "1"} and rest == [b, a, a]
