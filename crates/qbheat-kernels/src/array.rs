//! Dense single-precision arrays: Flex tensors without strides.

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{DType, Flex, TensorMetadata};
use burn::tensor::{Bytes, Tensor};

/// Entries row by row; a clone shares them.
#[derive(Clone, Debug)]
pub struct Array(FlexTensor);

impl Array {
    /// From entries, row by row.
    pub fn new(values: Vec<f32>, shape: &[usize]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let layout = Layout::contiguous(shape.to_vec().into());
        Self(FlexTensor::new(
            Bytes::from_elems(values),
            layout,
            DType::F32,
        ))
    }

    /// Nothing is copied where the entries stand row by row already.
    pub fn dense(tensor: FlexTensor) -> Self {
        if tensor.as_slice::<f32>().is_some() {
            Self(tensor)
        } else {
            Self(tensor.to_contiguous())
        }
    }

    /// Of a tensor on the CPU without a gradient of its own.
    pub fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        let tensor = tensor.try_into_primitive::<Flex>();
        Self::dense(tensor.expect("a tensor without gradients on the CPU"))
    }

    /// The inverse of [`Self::of`].
    pub fn into_plain<const D: usize>(self) -> Tensor<D> {
        Tensor::from_primitive::<Flex>(self.0)
    }

    /// Extents.
    pub fn shape(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }

    /// Extents, of which there are `D`.
    pub fn dims<const D: usize>(&self) -> [usize; D] {
        self.0.shape().dims()
    }

    /// Rows and columns where all axes but the last are one.
    pub fn matrix(&self) -> [usize; 2] {
        let shape = self.shape();
        let columns = shape.last().copied().unwrap_or(1);
        [self.len() / columns.max(1), columns]
    }

    /// The entries, to be changed; copied first where somebody else has them too.
    pub fn values_mut(&mut self) -> &mut [f32] {
        // A dense view may be part of a larger storage.
        let (start, end) = self
            .0
            .layout()
            .contiguous_offsets()
            .expect("an array is dense");
        &mut self.0.storage_mut::<f32>()[start..end]
    }

    pub fn into_tensor(self) -> FlexTensor {
        self.0
    }
}

impl std::ops::Deref for Array {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.0
            .as_slice::<f32>()
            .expect("an array is dense and of type f32")
    }
}
