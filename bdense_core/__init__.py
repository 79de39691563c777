"""B-DENSE distillation as a library: distils and scores, knows no service.

Method and notation: arXiv 2602.15971 (B-DENSE), arXiv 2409.19681 (SFD), arXiv 2206.00364 (EDM).
"""
