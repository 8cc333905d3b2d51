"""Stable Diffusion 3 as a flow map: SD3.5-Medium with the second time of AnyFlow and MeanFlowNFT."""
