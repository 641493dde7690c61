"""BibTeX of the papers that a model card cites, by the address a compressor gives as its source."""

PAPERS = {
    "https://arxiv.org/abs/2501.15674": """@inproceedings{gu2025tensorllm,
  title     = {{TensorLLM}: Tensorising Multi-Head Attention for Enhanced Reasoning and
               Compression in {LLMs}},
  author    = {Gu, Yuxuan and Zhou, Wuyang and Iacovides, Giorgos and Mandic, Danilo},
  booktitle = {International Joint Conference on Neural Networks (IJCNN)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.15674}
}""",
    "https://arxiv.org/abs/2312.13558": """@inproceedings{sharma2024laser,
  title     = {The Truth is in There: Improving Reasoning in Language Models with
               Layer-Selective Rank Reduction},
  author    = {Sharma, Pratyusha and Ash, Jordan T. and Misra, Dipendra},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2312.13558}
}""",
    "https://arxiv.org/abs/2403.07378": """@inproceedings{wang2025svdllm,
  title     = {{SVD-LLM}: Truncation-aware Singular Value Decomposition for Large Language
               Model Compression},
  author    = {Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2403.07378}
}""",
    "https://arxiv.org/abs/2312.05821": """@misc{yuan2023asvd,
  title  = {{ASVD}: Activation-aware Singular Value Decomposition for Compressing Large Language
            Models},
  author = {Yuan, Zhihang and Shang, Yuzhang and Song, Yue and Wu, Qiang and Yan, Yan and Sun,
            Guangyu},
  year   = {2023},
  url    = {https://arxiv.org/abs/2312.05821}
}""",
    "https://arxiv.org/abs/2406.17261": """@misc{luo2024trawl,
  title  = {{TRAWL}: Tensor Reduced and Approximated Weights for Large Language Models},
  author = {Luo, Yiran and Patel, Het and Fu, Yu and Ahn, Dawon and Chen, Jia and Dong, Yue
            and Papalexakis, Evangelos E.},
  year   = {2024},
  url    = {https://arxiv.org/abs/2406.17261}
}""",
}
ALWAYS = ("https://arxiv.org/abs/2501.15674", "https://arxiv.org/abs/2312.13558")


def citation(source: str) -> str:
    """Markdown with BibTeX of the two papers tensorllm rests on, and of the strategy's own.

    A source that is not among the papers here, such as a plugin's, is given by its address.
    """
    cited = dict.fromkeys((*ALWAYS, source))
    entries = "\n\n".join(PAPERS[url] for url in cited if url in PAPERS)
    own = f"\n\nThe method itself: <{source}>" if source and source not in PAPERS else ""
    return f"```bibtex\n{entries}\n```{own}"
