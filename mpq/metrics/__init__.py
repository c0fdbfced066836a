"""Metrics: what a network's answers are worth, built in or the user's.

- `metric`: what a metric is, and how sure the difference of two networks is
- `builtin`: top-1, mean IoU, PSNR, SSIM, and agreement with the float network
- `detections`: COCO's mean average precision
- `given`: from a name, an object or a function to a metric
"""
