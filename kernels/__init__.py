"""Operations of DeepSeek-V4, one file each: its plain PyTorch definition (`reference_*`) and one public function."""
