"""Fine-tune by a recipe under a launcher.

deepspeed launch/finetune.py --config configs/quickstart.yaml key=value ...
"""

from zo_ds.cli import finetune

if __name__ == "__main__":
    finetune()
