import onnxruntime, time, os
from onnx import helper as h, TensorProto as T; m=h.make_model(h.make_graph([h.make_node('Relu',['x'],['y'])],'g',[h.make_tensor_value_info('x',T.FLOAT,[1])],[h.make_tensor_value_info('y',T.FLOAT,[1])]),opset_imports=[h.make_opsetid('',17)],ir_version=8)
s=onnxruntime.InferenceSession(m.SerializeToString())
t=time.time()
while time.time()-t<25 and not os.path.exists(os.environ["LOOKUPS"]): time.sleep(.1)
print(time.time()-t)
