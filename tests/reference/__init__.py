"""The reference checks, in reading order: each part against its equations, a slow plain version, or the frozen models.

    test_01_block.py          the Q-Adapter's block, write-back and the frozen ViT
    test_02_captions.py       the loss of captions, what is trained, what the language model reads
    test_03_mllm.py           the same on multimodal language models
    test_04_baselines.py      LoRA, AdaptFormer and deep prompts
    test_05_optimizer.py      learning rates that fit every width
    test_06_resume.py         a killed run
    test_07_processes.py      two processes against one
    test_08_memory.py         the planned memory against the measured one
"""
