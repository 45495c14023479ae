"""A grading process with one more task, whose scorer does what the answer names."""

import os
import signal
import sys
from dataclasses import dataclass

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import register_dataset

from amalgam.rewards.grader import main


@dataclass
class MisbehaveConfig:
    seed: int = 0
    size: int = 1

    def validate(self) -> None:
        pass


class MisbehaveDataset(ProceduralDataset):
    def __getitem__(self, idx):
        return {"question": "?", "answer": "right", "metadata": {}}

    def score_answer(self, answer, entry):
        match answer:
            case "hang":
                while True:
                    pass
            case "raise":
                raise ValueError("one\nline" + 500 * "!")
            case "exit":
                os._exit(3)
            case "sys.exit":
                sys.exit(4)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "memory":
                bytearray(3 * 2**30)
            case "eval":
                return eval("1")
            case "nan":
                return float("nan")
            case "over":
                return 7
            case "under":
                return -7
            case "print":
                print("[]", flush=True)
                os.write(1, b'["score", 0.5]\n')
            case "read":
                return float(os.read(0, 1) == b"")
        return super().score_answer(answer, entry)


register_dataset("misbehave", MisbehaveDataset, MisbehaveConfig)

if __name__ == "__main__":
    main()
