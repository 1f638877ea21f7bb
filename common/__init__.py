"""What two stages share: pictures and videos (images), tensors in files (weights), run folders (runs), measures (metrics)."""
