"""Who is told of a run while it trains: TensorBoard, W&B, MLflow, and a webhook (docs/trackers.md)."""
